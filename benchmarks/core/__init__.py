"""What every benchmark shares. Nothing here knows an op: bench_<op>.py says what it needs."""
