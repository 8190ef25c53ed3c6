"""Draws docs/performance.md and its plots from the results of a card, and checks the gate.

    python benchmarks/report.py               the H200: docs/performance.md
    python benchmarks/report.py --card h100   docs/performance_h100.md
    python benchmarks/report.py --gate        what keeps the results from passing; status 1 if any

The gate is that no case of an op in GATED is slower than its peer in the same run.
"""

import argparse
import collections
import pathlib
import sys

import bench_chunk_attention
import bench_dense_decode
import bench_dense_sections
import bench_model
from core import cards, report, results

GATED = [bench_dense_decode.OP]
MAIN_CARD = "h200"

INTRO = """
Drawn by `python benchmarks/report.py --card {name}`: {device}, commit `{commit}`.

The tables have the median of microseconds a call, with `implementation="cuda"`. A jitted function
makes 8 to 64 calls. Each call reads pages of its own, in random order, from a pool of random data.
Together the calls read 300 MB of tokens or more, which do not fit into the L2. The schedule is made
beforehand. A peer is another library's kernel, timed in the same run on the same inputs, replayed
from a CUDA graph. Every output is compared with float32. [How it is
timed](../benchmarks/README.md#the-rules-of-timing).

**Floor**: the least time that a call can take on this card, max(FLOP / {flops:.0f} TFLOP/s, bytes /
{bytes:.2f} TB/s). **Share**: floor over time. These rates are constants of the card, so a few large
calls show a little more than 100%. **Ratio**: the peer's time over ours.
"""

CEILINGS = """
Measured in the same run: reading {read_gbs} GB/s (a kernel that only reads), bf16 8192³ matrix
products {matmul_bf16_tflops} TFLOP/s (PyTorch).
"""


def page_of(name, data, model, docs):
    """The page of a card; its plots are written to `docs`."""
    tail = "" if name == MAIN_CARD else f"_{name}"
    card = cards.card_of(data["device"])
    stamps = collections.Counter((row["commit"], row["jax"]) for row in data["rows"])
    commit, jax_version = stamps.most_common(1)[0][0]
    text = INTRO.format(
        name=name, device=f"{data['device']}, jax {jax_version}", commit=commit,
        flops=card.flops / 1e12, bytes=card.bytes / 1e12,
    )  # fmt: skip
    if ceilings := data["ceilings"]:
        text += CEILINGS.format(**ceilings)
    page = report.Page(card.name, text, commit)
    report.decode_section(
        page, bench_dense_decode.OP, "Dense decode", bench_dense_decode.ABOUT, data["rows"],
        docs / f"speed{tail}.svg",
    )  # fmt: skip
    bench_dense_sections.report_on(page, data["rows"], docs / f"growth{tail}.svg")
    bench_model.report_on(page, model)
    report.op_tables(page, bench_chunk_attention.OP, data["rows"], bench_chunk_attention.ABOUT)
    return page


def print_gate(data):
    """Prints the verdict; returns whether every op passes."""
    failures = []
    for op in GATED:
        failures += report.gate_failures(op, data)
        print(f"{op.name}: {report.summary(report.of(data['rows'], op.name, 'table'))}")
    print(*failures, sep="\n")
    print("the gate is passed" if not failures else f"the gate is missed: {len(failures)} lines")
    return not failures


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default=MAIN_CARD, help="the name of a results file")
    parser.add_argument("--results", type=pathlib.Path, default=cards.FOLDER, help="their folder")
    parser.add_argument("--docs", type=pathlib.Path, default=cards.FOLDER.parent.parent / "docs")
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args(argv)
    path, model = (options.results / f"{options.card}{tail}.json" for tail in ("", "_model"))
    data = results.read(path)
    if options.gate:
        return 0 if print_gate(data) else 1
    options.docs.mkdir(parents=True, exist_ok=True)
    page = page_of(options.card, data, results.read(model) if model.exists() else {}, options.docs)
    tail = "" if options.card == MAIN_CARD else f"_{options.card}"
    written = options.docs / f"performance{tail}.md"
    written.write_text(str(page), encoding="utf-8")
    print(f"wrote {written} and its plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
