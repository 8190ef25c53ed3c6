"""Draws docs/performance.md and its plots from a results file, and checks gate and goals.

The page of another card than the H200 has its name: docs/performance_h100.md. Goals and stored
figures of peers are of an H200, and left out of it.

python benchmarks/report.py            writes docs/performance.md and its plots
python benchmarks/report.py --gate     prints what misses the gate; exit status 1 if any does
python benchmarks/report.py --goals    the same for the goals
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

import cards
import goals
import plots
import workloads
from tables import grouped, markdown, name_of, number, title_of

HERE = pathlib.Path(__file__).resolve().parent
MAX_REL_ERR = 1e-2
GATE_LARGE_BATCH, GATE_LARGE, GATE_ANYWHERE = 64, 0.97, 0.90
PEER_TOLERANCE = 0.15

INTRO = """# Performance on one {card}

Drawn by `python benchmarks/report.py --results benchmarks/results/{file}`:
{device}, commit `{commit}`.

One call of `flash_mla_with_kvcache` with `implementation="cuda"`, in a jitted function of 8 to 64
calls; d_k 576, d_v 512, one KV head; `s_q` 2 is causal. Microseconds a call, median. Each call
reads pages of its own, in random order, from a pool of random data; all sets together are 256 MB
or more, so that the L2 does not serve them. The metadata is made beforehand; "+ metadata" is the
time of a call that makes its own. The peer is {peer}, timed in the same run on the same inputs,
replayed from a CUDA graph with its metadata made beforehand. Every output is compared with
float32.

**Floor**: max(2·h_q·s_q·Σlen·(d_k+d_v) / {flops:.0f} TFLOP/s, bytes of cache, queries and outputs /
{bytes:.2f} TB/s). **Share**: floor over time. **Ratio**: the peer's time over ours.
{ceilings}
"""

ATTENTION = """\
The attention of the last chunk of a context alone, from the queries of each head to its values:
microseconds a layer, all layers in a loop, each on pages of its own. Op: queries absorbed into the
latent space, and the result taken out of it. The others gather the latents from their pages, expand
them into keys and values of each head, and call `jax.nn.dot_product_attention`: cuDNN with a mask;
cuDNN over what stands before the chunk and, causal, over the chunk, joined by
`merge_attention_states`; XLA with a mask. Values are padded to the width of keys, which the call
asks for. Times: the fastest of these over the op. Difference: the largest of theirs from the op's
result, as norm over norm.
"""


def print_goals(results):
    """Prints how the goals stand; returns whether all are met."""
    if not goals.apply_to(results):
        print(f"the goals are of an {cards.H200.name}, the results of {results['device']}")
        return False
    misses = goals.misses(results)
    print(*misses, sep="\n")
    for cells in goals.table_cells(results):
        print(" | ".join(cells))
    print(f"{len(results['rows'])} cases at commit {results['commit']} on {results['device']}")
    print("the goals are met" if not misses else f"goals are missed: {len(misses)} lines")
    return not misses


def read_results(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def void_rows(results):
    """Rows in which the peer is too far from its stored figure for the run to count."""
    found = []
    for row in results["rows"] if goals.apply_to(results) else []:
        case = workloads.case_of(row)
        if workloads.is_anchor(case) and row["peer_us"]:
            stored = workloads.stored_peers()[case]["flashmla_us"]
            if abs(row["peer_us"] / stored - 1) > PEER_TOLERANCE:
                found.append(f"{case.name}: the peer took {row['peer_us']} us, stored are {stored}")
    return found


def gate_failures(results):
    """What keeps the results from meeting the gate, one line each."""
    rows = results["rows"]
    failures = [f"void: {text}" for text in void_rows(results)]
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
    if goals.apply_to(results):
        pairs = [(goals.best_stored_us(workloads.case_of(row)), row["us"]) for row in rows]
        best = geometric_mean(stored / us for stored, us in pairs if stored)
        print(f"geometric mean of the best stored peer over ours: {best:.3f}")
    print("the gate is met" if not failures else f"the gate is missed: {len(failures)} lines")
    return not failures


def table(rows):
    """The rows of one dtype, page size, s_q and h_q."""
    head = ["batch x length", "us", "share", "floor", "+ metadata", "peer us", "ratio",
            "rel. error"]  # fmt: skip
    return markdown(head, [
        [
            name_of(row),
            number(row["us"], 1),
            f"{row['of_floor']:.0%}",
            number(row["floor_us"], 1),
            number(row["us_with_metadata"], 1),
            number(row["peer_us"], 1),
            number(row["ratio"], 2),
            f"{row['rel_err']:.1e}",
        ]
        for row in rows
    ])  # fmt: skip


def ceilings_text(ceilings):
    if not ceilings:
        return ""
    return (
        f"\nCeilings measured in the same run: reading {ceilings['read_gbs'] / 1e3:.2f} TB/s "
        f"({ceilings['read_method']}), bf16 8192³ matrix product "
        f"{ceilings['matmul_bf16_tflops']} TFLOP/s ({ceilings['matmul_method']})."
    )


def long_name(row):
    return f"{name_of(row)}, h_q {row['h_q']}, s_q {row['s_q']}"


def baseline_section(rows):
    """The pure-JAX form beside ours, for the rows that have it."""
    cells = [
        [long_name(row), f"{row['us']:.1f}", f"{row['jax_us']:.0f}",
         f"{row['jax_us'] / row['us']:.1f}"]
        for row in rows
        if row.get("jax_us")
    ]  # fmt: skip
    return section(
        "Beside plain JAX",
        'The same op with `implementation="xla"`: the pages gathered, two matrix products.',
        ["case", "us", "plain JAX us", "times"],
        cells,
    )


def section(title, text, head, cells, note=""):
    """A section with a table; nothing where there are no cells."""
    if not cells:
        return ""
    return f"\n## {title}\n\n{text}{note}\n\n{markdown(head, cells)}"


def rows_and_note(results, name):
    """The rows of a section, and a sentence if they are of another commit than the rest."""
    found = results.get(name, {"commit": results["commit"], "rows": []})
    other = found["commit"] != results["commit"]
    return found["rows"], f" Measured at commit `{found['commit']}`." if other else ""


def goals_section(results):
    return section(
        "Goals",
        "Best peer: of FlashMLA, FlashAttention-3 and FlashInfer the fastest in\n"
        "`benchmarks/peers_h200.json`, scaled by the stored ceiling (reading or matrix product, "
        "whichever sets\nthe floor) over the one of this run, by at most 5%. Where the floor is "
        "under 100 us, no goal is\nstricter than floor / 0.95 + 4.5 us.",
        ["regime", "goal", "cases met", "worst"],
        goals.table_cells(results) if goals.apply_to(results) else [],
    )


def sustained_section(rows):
    """Ours and the peer under lasting load, where the card's power is the limit."""
    cells = [
        [
            long_name(row), number(row["us"], 1), number(row["sustained_us"], 1),
            number(row["sustained_mhz"], 0), number(row["sustained_watts"], 0),
            number(row.get("peer_sustained_us"), 1), number(row.get("peer_sustained_mhz"), 0),
            number(row.get("peer_sustained_watts"), 0),
        ]
        for row in rows
        if row.get("sustained_us")
    ]  # fmt: skip
    return section(
        "Under lasting load",
        "The compute-bound cases for 0.15 s without a rest, after a warm-up: the card draws what "
        "it may,\nand the SM clock falls. The clock is measured on the device right after; the "
        "power is NVML's.",
        ["case", "us in bursts", "us", "MHz", "W", "peer us", "MHz", "W"],
        cells,
    )


def layers_section(results):
    rows, note = rows_and_note(results, "layers")
    cells = [
        [
            long_name(row), row["form"], number(row["us"], 2), number(row["alone_us"], 2),
            f"{row['over']:+.1%}", number(row.get("host_us"), 1), number(row["graph_launches"], 0),
            number(row["single_launches"], 0), str(row["distinct_caches"]),
        ]
        for row in rows
    ]  # fmt: skip
    count = rows[0]["layers"] if rows else 0
    return section(
        f"A step of {count} layers",
        "A jitted step that makes the metadata and calls the op for each layer, all layers' pages "
        "in one\nbuffer, the block table moved by layer; beside it as many calls of the kernel "
        "alone, on the same\npages. Microseconds a layer. Host: what the host takes to enqueue the "
        "step, with three arrays a layer\nto pass; where that is as long as the step, the host is "
        "what is timed. Launches: how many CUDA graphs,\nand how many commands outside of them, "
        "XLA's plan of the step holds. Caches: how many layers have\npages of their own; the "
        'others use these again in turn. "scan, graphs of 1" is compiled with\n'
        "`xla_gpu_graph_min_graph_size=1`; without it XLA makes no graph of a loop's body that has "
        "fewer than 5\ncommands.",
        [
            "case",
            "form",
            "us a layer",
            "alone us",
            "over",
            "host us",
            "graphs",
            "commands",
            "caches",
        ],
        cells,
        note,
    )


def variants_section(results):
    rows, note = rows_and_note(results, "variants")
    cells = [
        [
            long_name(row), row["dtype"], str(row["page_block_size"]), number(row["us"], 1),
            number(row["twin_us"], 1), f"{row['to_twin'] - 1:+.1%}", f"{row['rel_err']:.1e}",
        ]
        for row in rows
    ]  # fmt: skip
    return section(
        "fp16 and page sizes",
        "Each beside the same case in bf16 with pages of 64, which takes turns with it.",
        ["case", "dtype", "page", "us", "bf16, page 64 us", "more", "rel. error"],
        cells,
        note,
    )


def fixed_section(results):
    rows, note = rows_and_note(results, "fixed")
    cells = [
        [
            long_name(row), str(row["fixed_split_size"]), number(row["us"], 1),
            number(row["twin_us"], 1), f"{row['to_twin'] - 1:+.1%}",
            number(workloads.scratch_bytes(row) / 1e6, 1), f"{row['rel_err']:.1e}",
        ]
        for row in rows
    ]  # fmt: skip
    return section(
        "Splits of a fixed size",
        "With `fixed_split_size`, which makes a sequence's result the same in every batch, beside "
        "the default\nschedule, which takes turns with it; `max_seqlen` is what the block table "
        "has room for.",
        ["case", "tokens a split", "us", "default us", "more", "scratch MB", "rel. error"],
        cells,
        note,
    )


def growth_section(results, plot):
    rows, note = rows_and_note(results, "growth")
    cells = [
        [
            long_name(row), number(row["us"], 1), f"{row['of_floor']:.0%}",
            number(row["us_with_metadata"], 1), number(row["peer_us"], 1),
            number(row["ratio"], 2),
        ]
        for row in sorted(rows, key=lambda r: (r["h_q"], r["varlen"], r["batch"], r["mean_len"]))
    ]  # fmt: skip
    return section(
        "How it grows",
        f"![share of the floor by batch and by length]({plot})\n\n"
        "Series of batches and of lengths; 3 repeats, 4 sequences of one input set compared\nwith "
        "float32. No call reads a page twice. A batch of 1 below 4096 tokens finds its pages in "
        "the L2.",
        ["case", "us", "share", "+ metadata", "peer us", "ratio"],
        cells,
        note,
    )


def model_section(results):
    """A whole model's step; nothing where none was measured."""

    def share(value):
        return "" if value is None else f"{value:.0%}"

    def one_row(row):
        ours, plain, peak = (row.get(key) for key in ("cuda_ms", "xla_ms", "peak_bytes"))
        return [
            f"{row['batch']} x {row['context']}", f"{row['cache_bytes'] / 1e9:.1f}",
            number(ours, 2) or row["missing"]["cuda"], number(row.get("tokens_per_s"), 0),
            share(row.get("attention_share")), number(plain, 2) or row["missing"].get("xla", ""),
            share(row.get("xla_attention_share")),
            number(plain / ours if ours and plain else None, 1),
            number(peak and peak / 1e9, 1),
        ]  # fmt: skip

    decode = section(
        "In a whole model",
        f"`python benchmarks/model.py` on {results['device']}, commit `{results['commit']}`: "
        "examples/deepseek\nwith random weights of DeepSeek-V2-Lite's dimensions "
        f"({results['weights_bytes'] / 1e9:.1f} GB in bfloat16), a greedy step of\nthe whole "
        "model, beside the same model with attention in plain JAX. Share: how much of the step\n"
        "goes when attention is left out. GB: the cache, and the most that was in use up to then.",
        ["batch x context", "cache GB", "ms a step", "tokens/s", "share of attention",
         "plain JAX: ms a step", "share", "times", "peak GB"],
        [one_row(row) for row in results["rows"]],
    )  # fmt: skip
    prompts = section(
        "Reading a prompt",
        "The same model reads a prompt of random tokens, alone, in chunks: each is a step with "
        "that many\nqueries, through the same op.",
        ["prompt", "tokens a chunk", "ms", "tokens/s", "temporary GB"],
        [
            [
                str(row["prompt"]), str(row["chunk"]),
                number(row.get("ms"), 1) or row["missing"]["prefill"],
                number(row.get("tokens_per_s"), 0),
                number(row["temporary_bytes"] / 1e9 if "ms" in row else None, 2),
            ]
            for row in results["prefill"]
        ],
    )  # fmt: skip
    return f"{decode}\n{prompts}{attention_text(results.get('prefill_attention', []))}"


def attention_text(rows):
    """The attention of a prompt's chunk beside a library call; nothing where none was measured."""
    forms = ("op", "cudnn", "cudnn_split", "xla")

    def one_row(row):
        times = [row.get(f"{name}_us") for name in forms]
        ours, library = times[0], [us for us in times[1:] if us]
        return [
            str(row["context"]), str(row["chunk"]),
            *(
                number(us, 1) or row["missing"][name].split(":")[0]
                for name, us in zip(forms, times, strict=True)
            ),
            number(min(library) / ours if ours and library else None, 2),
            max((f"{row[f'{name}_difference']:.1e}" for name in forms[1:] if f"{name}_us" in row),
                key=float, default=""),
        ]  # fmt: skip

    if not rows:
        return ""
    head = ["context", "tokens a chunk", "op us", "cuDNN us", "cuDNN, two calls us", "XLA us",
            "times", "difference"]  # fmt: skip
    return f"\n\n{ATTENTION}\n{markdown(head, [one_row(row) for row in rows])}"


def page_text(results, file, plot, growth_plot, model=None):
    """The whole of docs/performance.md; model: the results of model.py, if there are any."""
    rows = results["rows"]
    peer = next((row["peer"] for row in rows if row["peer"]), "absent")
    card = cards.card_of(results["device"])
    intro = INTRO.format(
        file=file, device=results["device"], commit=results["commit"], peer=peer,
        card=card.name, flops=card.flops / 1e12, bytes=card.bytes / 1e12,
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
    parts.append(goals_section(results))
    for key, group in grouped(rows).items():
        parts.append(f"\n## {title_of(key)}\n\n{table(group)}")
    parts += [
        sustained_section(rows),
        layers_section(results),
        variants_section(results),
        fixed_section(results),
        growth_section(results, growth_plot),
        baseline_section(rows),
        model_section(model) if model else "",
    ]
    parts = [part for part in parts if part]
    return "\n".join(parts).rstrip() + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=cards.results_path(cards.H200.kind))
    parser.add_argument("--docs", type=pathlib.Path, default=HERE.parent / "docs")
    parser.add_argument("--gate", action="store_true")
    parser.add_argument("--goals", action="store_true")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    if options.gate:
        return 0 if print_gate(results) else 1
    if options.goals:
        return 0 if print_goals(results) else 1
    judged = goals.apply_to(results)
    tail = "" if judged else f"_{options.results.stem}"
    plot, growth_plot = (options.docs / f"{name}{tail}.svg" for name in ("performance", "growth"))
    options.docs.mkdir(parents=True, exist_ok=True)
    plots.draw_cases(results["rows"], plot, judged)
    written = [options.docs / f"performance{tail}.md", plot]
    if growth := results.get("growth", {"rows": []})["rows"]:
        plots.draw_growth(growth, growth_plot, judged)
        written.append(growth_plot)
    model = options.results.with_name(f"{options.results.stem}_model.json")
    text = page_text(
        results,
        options.results.name,
        plot.name,
        growth_plot.name,
        read_results(model) if model.exists() else None,
    )
    written[0].write_text(text, encoding="utf-8")
    print("wrote", *written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
