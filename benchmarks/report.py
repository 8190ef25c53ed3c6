"""Draws docs/performance.md and its plot from a results file, and checks the gate on speed.

python benchmarks/report.py            writes docs/performance.md and docs/performance.svg
python benchmarks/report.py --gate     prints what misses the gate; exit status 1 if any does
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import workloads

HERE = pathlib.Path(__file__).resolve().parent
MAX_REL_ERR = 1e-2
GATE_LARGE_BATCH, GATE_LARGE, GATE_ANYWHERE = 64, 0.97, 0.90
PEER_TOLERANCE = 0.15
PEER_FIGURES = ("flashmla_us", "fa3_us", "flashinfer_us")

INTRO = """# Performance

Drawn by `python benchmarks/report.py` from `benchmarks/results/{file}`:
{device}, commit `{commit}`.

One call of `flash_mla_with_kvcache` with `implementation="cuda"`, in a jitted function of 8 to 64
calls; d_k 576, d_v 512, one KV head; `s_q` 2 is causal. Microseconds a call, median. Each call
reads pages of its own, in random order, from a pool of random data; all sets together are 256 MB
or more, so that the L2 does not serve them. The metadata is made beforehand; "+ metadata" is the
time of a call that makes its own. The peer is {peer}, timed in the same run on the same inputs,
replayed from a CUDA graph with its metadata made beforehand. Every output is compared with
float32.

**Floor**: max(2·h_q·s_q·Σlen·(d_k+d_v) / 780 TFLOP/s, bytes of cache, queries and outputs /
4.55 TB/s). **Share**: floor over time. **Ratio**: the peer's time over ours.
{ceilings}
"""


def read_results(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def name_of(row):
    return f"{row['batch']} x {row['mean_len']}" + (" varlen" if row["varlen"] else "")


def best_stored_us(row):
    """The best figure of any peer that is stored for this case, or None."""
    stored = workloads.stored_peers().get(workloads.case_of(row), {})
    figures = [stored[key] for key in PEER_FIGURES if stored.get(key)]
    return min(figures, default=None)


def void_rows(rows):
    """Rows in which the peer is too far from its stored figure for the run to count."""
    found = []
    for row in rows:
        case = workloads.case_of(row)
        if workloads.is_anchor(case) and row["peer_us"]:
            stored = workloads.stored_peers()[case]["flashmla_us"]
            if abs(row["peer_us"] / stored - 1) > PEER_TOLERANCE:
                found.append(f"{case.name}: the peer took {row['peer_us']} us, stored are {stored}")
    return found


def gate_failures(results):
    """What keeps the results from meeting the gate, one line each."""
    rows = results["rows"]
    failures = [f"void: {text}" for text in void_rows(rows)]
    failures += [f"error: {text}" for text in results.get("errors", [])]
    measured = {workloads.case_of(row) for row in rows}
    failures += [f"{case.name}: missing" for case in workloads.all_cases() if case not in measured]
    for row in rows:
        name = workloads.case_of(row).name
        least = GATE_LARGE if row["batch"] >= GATE_LARGE_BATCH else GATE_ANYWHERE
        if not row["rel_err"] <= MAX_REL_ERR:
            failures.append(f"{name}: rel_err {row['rel_err']}")
        if row["ratio"] is None:
            failures.append(f"{name}: no peer")
        elif row["ratio"] < least:
            failures.append(
                f"{name}: ratio {row['ratio']:.3f} < {least} ({row['us']} us, peer "
                f"{row['peer_us']}, floor {row['floor_us']})"
            )
    return failures


def geometric_mean(values):
    values = list(values)
    return statistics.geometric_mean(values) if values else math.nan


def print_gate(results):
    """Prints the verdict; returns whether the gate is met."""
    failures = gate_failures(results)
    rows = [row for row in results["rows"] if row["ratio"]]
    large = [row["ratio"] for row in rows if row["batch"] >= GATE_LARGE_BATCH]
    print(*failures, sep="\n")
    print(f"{len(results['rows'])} cases at commit {results['commit']} on {results['device']}")
    print(
        f"geometric mean of the ratio: {geometric_mean(row['ratio'] for row in rows):.3f}; "
        f"batch >= {GATE_LARGE_BATCH}: {geometric_mean(large):.3f}, "
        f"least {min(large, default=math.nan):.3f}"
    )
    pairs = [(best_stored_us(row), row["us"]) for row in rows]
    best = geometric_mean(stored / us for stored, us in pairs if stored)
    print(f"geometric mean of the best stored peer over ours: {best:.3f}")
    print("the gate is met" if not failures else f"the gate is missed: {len(failures)} lines")
    return not failures


def grouped(rows):
    """Rows by what heads a table: (dtype, page_block_size, s_q, h_q)."""
    groups = {}
    for row in rows:
        key = (row["dtype"], row["page_block_size"], row["s_q"], row["h_q"])
        groups.setdefault(key, []).append(row)
    return dict(sorted(groups.items()))


def title_of(key):
    dtype, page, s_q, h_q = key
    return f"s_q {s_q}, h_q {h_q}, {dtype}, page {page}"


def number(value, digits):
    return "" if value is None else f"{value:.{digits}f}"


def table(rows):
    """One Markdown table."""
    lines = [
        "| batch x length | us | share | floor | + metadata | peer us | ratio | rel. error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            name_of(row),
            number(row["us"], 1),
            f"{row['of_floor']:.0%}",
            number(row["floor_us"], 1),
            number(row["us_with_metadata"], 1),
            number(row["peer_us"], 1),
            number(row["ratio"], 2),
            f"{row['rel_err']:.1e}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ceilings_text(ceilings):
    if not ceilings:
        return ""
    return (
        f"\nCeilings measured in the same run: reading {ceilings['read_gbs'] / 1e3:.2f} TB/s "
        f"({ceilings['read_method']}), bf16 8192³ matrix product "
        f"{ceilings['matmul_bf16_tflops']} TFLOP/s ({ceilings['matmul_method']})."
    )


def baseline_table(rows):
    """The pure-JAX form beside ours, for the rows that have it."""
    lines = [
        "\n## Beside plain JAX\n",
        'The same op with `implementation="xla"`: the pages gathered, two matrix products.\n',
        "| case | us | plain JAX us | times |",
        "|---|---|---|---|",
    ]
    rows = [row for row in rows if row.get("jax_us")]
    for row in rows:
        name = f"{name_of(row)}, h_q {row['h_q']}, s_q {row['s_q']}"
        lines.append(
            f"| {name} | {row['us']:.1f} | {row['jax_us']:.0f} | {row['jax_us'] / row['us']:.1f} |"
        )
    return "\n".join(lines) if rows else ""


def page_text(results, file, plot):
    """The whole of docs/performance.md."""
    rows = results["rows"]
    peer = next((row["peer"] for row in rows if row["peer"]), "absent")
    intro = INTRO.format(
        file=file, device=results["device"], commit=results["commit"], peer=peer,
        ceilings=ceilings_text(results["ceilings"]),
    )  # fmt: skip
    ratios = [row["ratio"] for row in rows if row["ratio"]]
    parts = [intro.rstrip()]
    if ratios:
        parts.append(
            f"\nOver {len(ratios)} cases the ratio's geometric mean is "
            f"{geometric_mean(ratios):.2f}, its least {min(ratios):.2f}."
        )
    parts.append(f"\n![share of the floor by case]({plot})\n")
    for key, group in grouped(rows).items():
        parts.append(f"\n## {title_of(key)}\n\n{table(group)}")
    parts.append(baseline_table(rows))
    return "\n".join(parts).rstrip() + "\n"


def draw_plot(results, path):
    """Share of the floor by case: ours, the peer of the run, the best stored peer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same figures, with its text as text.
    plt.rcParams.update({"svg.hashsalt": "performance", "svg.fonttype": "none"})
    groups = grouped(results["rows"])
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    size = (3.6 * columns + 1.6, 3.2 * lines + 0.8)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharey=False, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(groups) :]:
        axis.set_visible(False)
    for axis, (key, rows) in zip(axes.flat, groups.items(), strict=False):
        draw_panel(axis, key, rows)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=120)
    plt.close(figure)


def draw_panel(axis, key, rows):
    places = range(len(rows))

    def share(times):
        return [
            100 * row["floor_us"] / us if us else math.nan
            for row, us in zip(rows, times, strict=True)
        ]

    series = [
        ("jax_flashmla", [row["us"] for row in rows], "o", "#1f5fbf"),
        ("FlashMLA, same run", [row["peer_us"] for row in rows], "x", "#c05a1a"),
        ("best peer, stored figure", [best_stored_us(row) for row in rows], "|", "#808080"),
    ]
    for label, times, marker, color in series:
        size = 11 if marker == "|" else 6
        axis.plot(share(times), places, marker, color=color, label=label, markersize=size)
    axis.set_yticks(places, [name_of(row) for row in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 105)
    axis.set_xlabel("% of the floor", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.set_title(title_of(key), fontsize=9)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results" / "h200.json")
    parser.add_argument("--docs", type=pathlib.Path, default=HERE.parent / "docs")
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    if options.gate:
        return 0 if print_gate(results) else 1
    plot = options.docs / "performance.svg"
    options.docs.mkdir(parents=True, exist_ok=True)
    draw_plot(results, plot)
    page = options.docs / "performance.md"
    page.write_text(page_text(results, options.results.name, plot.name), encoding="utf-8")
    print(f"wrote {page} and {plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
