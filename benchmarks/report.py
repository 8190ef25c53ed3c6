"""Draws docs/performance.md and its plots from the results of a card, and checks the gate.

    python benchmarks/report.py               the H200: docs/performance.md
    python benchmarks/report.py --card h100   docs/performance_h100.md
    python benchmarks/report.py --gate        what keeps the results from passing; status 1 if any

The gate is that no case of an op in GATED is slower than its peer in the same run. The README's
table of sparse decode is written too, between two comments there.
"""

import argparse
import collections
import pathlib
import sys

import bench_chunk_attention
import bench_dense_decode
import bench_dense_sections
import bench_model
import bench_sparse_decode
from core import cards, report, results

GATED = {"": bench_dense_decode.OP, "_sparse": bench_sparse_decode.OP}  # by the file's suffix
MAIN_CARD, CARDS = "h200", ("h200", "h100")
README_BEGIN, README_END = "<!-- sparse decode, by benchmarks/report.py -->\n", "<!-- end -->\n"
README_HEADS = (8, 16, 64, 128)

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


HEADS = """
Beside the same call with the next of 64 and 128 heads."""

README = """
Sparse decode on one {card} at commit `{commit}`: microseconds a call (floor / time, {peer}'s
time / ours). d_k is 576; with an extra list, "128 + 1024", it is 512. {summary}
"""


def sparse_section(page, rows, plot):
    op = bench_sparse_decode.OP
    report.decode_section(page, op, "Sparse decode", bench_sparse_decode.ABOUT, rows, plot)
    page.section(
        "Other numbers of heads", HEADS, report.of(rows, op.name, "heads"),
        [
            ("heads", "h_q", ""), (op.labels, op.label, ""), ("us", "us", ".1f"),
            ("us of the next", "next_us", ".1f"), ("peer us", "peer_us", ".1f"),
            ("ratio", "ratio", ".2f"), ("rel. error", "rel_err", ".1e"),
        ],
    )  # fmt: skip


def readme_table(data):
    """The README's part on sparse decode on a card: a line a shape, a column a number of heads."""
    op = bench_sparse_decode.OP
    rows = [row for row in report.of(data["rows"], op.name, "table") if row["ratio"]]
    shown = {
        (op.label(row), row["h_q"]): row
        for row in rows
        if row["topk"] == 2048 or row["extra_topk"] == 1024
    }
    lines = dict.fromkeys(label for label, _ in shown)

    def cell(heads):
        def text(label):
            row = shown.get((label, heads))
            return row and f"{row['us']:.1f} ({row['of_floor']:.0%}, {row['ratio']:.2f}x)"

        return text

    columns = [(op.labels, str, ""), *((f"h_q {h}", cell(h), "") for h in README_HEADS)]
    text = README.format(
        card=cards.card_of(data["device"]).name, commit=", ".join({r["commit"]: "" for r in rows}),
        peer=rows[0]["peer"].split(" (")[0], summary=report.summary(rows),
    )  # fmt: skip
    return f"{report.wrapped(text)}\n\n{report.markdown(lines, columns)}\n"


def write_readme(path, results_of):
    """Between the two comments in the README, the table of the first card that has results."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = [data for name in CARDS if (data := results_of(name, "_sparse"))]
    if README_BEGIN in text and found:
        head, rest = text.split(README_BEGIN)
        tail = rest.split(README_END, 1)[1]
        table = readme_table(found[0])
        path.write_text(f"{head}{README_BEGIN}{table}{README_END}{tail}", encoding="utf-8")


def page_of(name, results_of, docs):
    """The page of a card; its plots are written to `docs`."""
    data, model, sparse = (results_of(name, suffix) for suffix in ("", "_model", "_sparse"))
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
    sparse_section(page, sparse.get("rows", []), docs / f"sparse_speed{tail}.svg")
    bench_model.report_on(page, model)
    report.op_tables(page, bench_chunk_attention.OP, data["rows"], bench_chunk_attention.ABOUT)
    return page


def print_gate(name, results_of):
    """Prints the verdict; returns whether every op that has results passes."""
    failures = []
    for suffix, op in GATED.items():
        if not (data := results_of(name, suffix)):
            continue
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

    def results_of(name, suffix):
        path = options.results / f"{name}{suffix}.json"
        return results.read(path) if path.exists() or not suffix else {}

    if options.gate:
        return 0 if print_gate(options.card, results_of) else 1
    options.docs.mkdir(parents=True, exist_ok=True)
    page = page_of(options.card, results_of, options.docs)
    write_readme(options.docs.parent / "README.md", results_of)
    tail = "" if options.card == MAIN_CARD else f"_{options.card}"
    written = options.docs / f"performance{tail}.md"
    written.write_text(str(page), encoding="utf-8")
    print(f"wrote {written} and its plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
