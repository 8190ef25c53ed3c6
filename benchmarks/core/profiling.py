"""Which kernels a round runs, when, and whether one call starts before the last one ended."""

import collections
import itertools
import json
import pathlib
import statistics
import tempfile


def record(round_):
    """The kernels of one round as (name, start us, end us), in order of their start.

    PyTorch's profiler records them; it sees JAX's kernels too.
    """
    import torch

    for _ in range(3):
        round_.enqueue()
    round_.wait()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "trace.json"
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            round_.enqueue()
            round_.wait()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        raise RuntimeError("the profiler recorded no kernel")
    found = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in kernels]
    return sorted(found, key=lambda kernel: kernel[1])


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
