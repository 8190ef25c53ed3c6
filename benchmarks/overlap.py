"""Which kernels a round runs, when, and whether one call starts before the last one ended."""

import collections
import gzip
import itertools
import json
import pathlib
import statistics
import tempfile

import jax


def _torch_kernels(round_):
    """Kernels as (name, start us, end us), recorded by torch's profiler; it sees JAX's too."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
            round_.enqueue()
            round_.wait()
            torch.cuda.synchronize()
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    return [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in kernels]


def _jax_kernels(round_):
    """The same from JAX's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            round_.enqueue()
            round_.wait()
        (path,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    devices = {
        event["pid"]
        for event in events
        if event.get("name") == "process_name" and "/device:GPU" in event["args"]["name"]
    }
    return [
        (event["name"], event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("ph") == "X" and event.get("pid") in devices
        and "kernel_details" in event.get("args", {})
    ]  # fmt: skip


def record(round_):
    """The kernels of one round in order of their start."""
    for _ in range(3):
        round_.enqueue()
    round_.wait()
    for recorder in (_torch_kernels, _jax_kernels):
        try:
            kernels = recorder(round_)
        except Exception as error:
            print(f"{recorder.__name__}: {type(error).__name__}: {error}", flush=True)
            continue
        if kernels:
            return sorted(kernels, key=lambda kernel: kernel[1])
    raise RuntimeError("no profiler recorded a kernel")


def summarize(kernels, calls):
    """Lines that say what ran, and the largest overlap of two calls in microseconds."""
    by_name = collections.defaultdict(list)
    for name, start, end in kernels:
        short = name.replace("(anonymous namespace)::", "").split("(")[0][:90]
        by_name[short].append(end - start)
    lines = [
        f"  {len(times):5d} x {statistics.median(times):9.2f} us  {name}"
        for name, times in by_name.items()
    ]
    if len(kernels) % calls:
        lines.append(f"  {len(kernels)} kernels do not divide into {calls} calls")
        return lines, None
    each = len(kernels) // calls
    groups = [kernels[i : i + each] for i in range(0, len(kernels), each)]
    spans = [(min(k[1] for k in group), max(k[2] for k in group)) for group in groups]
    gaps = [after[0] - before[1] for before, after in itertools.pairwise(spans)]
    overlap = max([0.0] + [-gap for gap in gaps])
    busy = statistics.median(end - start for start, end in spans)
    lines.append(
        f"  {calls} calls of {each} kernels; a call lasts {busy:.2f} us, then "
        f"{statistics.median(gaps) if gaps else 0:.2f} us pass before the next "
        f"(least {min(gaps, default=0):.2f}); calls overlap by at most {overlap:.2f} us"
    )
    return lines, overlap
