"""The clients of the benchmarks' core: their cases, programs and results; they run on the CPU."""

import dataclasses
import gc
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_torch import FakeTorch
from lowering import DECODE, SCHEDULE_AND_DECODE, copies_in

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_chunk_attention as chunks
import bench_dense_decode as dense
import bench_dense_sections as sections
import bench_model
import report as pages
from bench_dense_decode import OP, DenseDecode
from core import cards, launches, report
from core.bench import Machine
from core.results import read
from core.rounds import DonatedRound, Inputs, OpRound, Programs
from core.run import Run

ROOT = pathlib.Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"

SMOKE = OP.smoke[0]


def pool_struct(page=64, pages=1000):
    return jax.ShapeDtypeStruct((pages, page, 1, dense.HEAD_DIM_K), jnp.bfloat16)


def make_inputs(case, programs, pool, calls):
    return Inputs(OP, case, programs.draw(), pool, calls)


# -------------------- The cases of dense decode


def test_the_cases_match_the_stored_rows():
    """113 of them; lengths and floors are those of the stored rows."""
    assert len({case.name for case in OP.cases}) == len(OP.cases) == 113
    results = read(BENCHMARKS / "results/h200.json")
    rows = {row["case"]: row for row in report.of(results["rows"], OP.name, "table")}
    assert rows.keys() == {case.name for case in OP.cases}
    for case in OP.cases:
        assert rows[case.name].items() >= case.row().items()
        assert case.floor_us(cards.H200) == pytest.approx(rows[case.name]["floor_us"], abs=0.006)
        assert case.causal == (case.s_q == 2)
    assert {case.name for case in [*OP.quick, *OP.baseline]} <= rows.keys()
    assert {name for name, row in rows.items() if "jax_us" in row} == {c.name for c in OP.baseline}


def test_a_floor_is_set_by_reading_or_by_arithmetic():
    reads, computes = DenseDecode(16, 1, 128, 4096), DenseDecode(128, 2, 128, 4096)
    assert reads.floor_us(cards.H100) == pytest.approx(reads.floor_us() * 4.55 / 3.08)
    assert computes.floor_us(cards.H100) == computes.floor_us()
    assert computes.floor_us() == pytest.approx(4 * 128 * 128 * 4096 * (576 + 512) / 780e6)
    tokens = 128 * 4096 * 576 + 16 * 128 * (576 + 512)
    assert reads.floor_us() == pytest.approx(2 * tokens / 4.55e6)


def test_inputs_of_a_round_are_too_large_for_the_l2():
    for case in OP.cases:
        assert case.calls * sum(case.lengths()) * dense.HEAD_DIM_K * 2 >= 256e6
    for case in chunks.OP.cases:
        assert case.calls * case.context * (512 + 64) * 2 >= 256e6


def test_a_uniform_case_and_its_ragged_twin_share_their_programs():
    twins = [DenseDecode(16, 1, 128, 4096, varlen=varlen) for varlen in (False, True)]
    assert len({(case.shape_key, case.calls, case.loops, case.table_width) for case in twins}) == 1
    assert len(set(twins[1].lengths())) > 100


def test_short_rounds_are_long_enough_to_dispatch():
    loops = {case: case.loops for case in OP.cases}
    assert loops[DenseDecode(16, 1, 1, 4096)] == 8
    assert loops[DenseDecode(16, 1, 128, 4096)] == 1
    for case, count in loops.items():
        assert case.calls * count * max(case.floor_us(), 6.0) >= 400


def test_the_power_limits_the_compute_bound_cases():
    cases = [case for case in OP.cases if OP.is_sustained(case)]
    assert len(cases) == 19
    assert all(case.compute_us() > case.memory_us() for case in cases)


def test_growth_covers_its_range():
    cases = sections.growth_cases()
    assert len(set(cases)) == len(cases)
    for heads in (16, 128):
        ours = [case for case in cases if case.h_q == heads]
        batches = {case.batch for case in ours if case.mean_len == 4096}
        assert {1, 2, 64, 1024, 4096} <= batches
        for batch, longest in ((1, 2**20), (128, 2**16)):
            lengths = {case.mean_len for case in ours if case.batch == batch}
            assert {64, 1024, longest} <= lengths
        assert {case.batch for case in ours if case.varlen} == {256, 1024, 4096}
    assert max(case.pages() for case in cases) * 64 <= sections.MAX_GROWTH_TOKENS


# -------------------- Its programs


@pytest.mark.parametrize("kind", ["given", "made"])
@pytest.mark.usefixtures("compiled_kernels")
def test_short_rounds_run_in_a_loop(kind, h200):
    """All calls stay in its body, nothing is copied, and a turn is one graph."""
    case, calls, loops = DenseDecode(16, 1, 2, 4096), 5, 7
    programs = Programs(OP, case, pool_struct(), calls, loops, sharding=h200)
    lowered = programs.lower_round("cuda", kind)
    compiled, counts = launches.compile_and_count(lowered, loops, {})
    text = compiled.as_text()
    body = re.search(r"while\(.*body=%?([\w.]+)", text)[1]
    body = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    target = SCHEDULE_AND_DECODE if kind == "made" else DECODE
    for part in (body, text):
        assert re.findall(r'"(jax_flashmla_\w+)"', part) == [target] * calls
    assert not copies_in(body)
    assert counts[0] == loops
    assert counts[1] <= 1  # the loop's counter, before it


def test_rounds_in_a_loop_give_what_one_gives():
    pool = OP.pool([SMOKE], lambda _: 1)
    results = []
    for loops in (1, 3):
        programs = Programs(OP, SMOKE, pool, 1, loops)
        inputs = make_inputs(SMOKE, programs, pool, 1)
        schedule = programs.prepare("xla")(inputs.shared)
        op_round = OpRound(programs.round("xla", "given"), inputs, schedule, 1, loops)
        op_round.round.enqueue()
        results.append(op_round.results)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert not np.isnan(np.asarray(results[0][0][0], np.float32)).any()


def test_a_sample_of_sequences_is_checked():
    """The first and the last are in the sample. Sequences outside it are not compared."""
    case = DenseDecode(2, 1, 5, 64)
    pool = OP.pool([case], lambda _: 1)
    programs = Programs(OP, case, pool, 1)
    inputs = make_inputs(case, programs, pool, 1)
    out, lse = dense.call(case, "xla", pool, inputs.shared, None, inputs.owns[0])
    check = jax.jit(lambda *args: dense.check_results(case, *args, sample=3))
    for sequence, seen in ((0, True), (1, False), (2, True), (4, True)):
        wrong = [(out.at[sequence].set(jnp.nan), lse), (out, lse.at[sequence].add(1))]
        errors = check(pool, inputs.shared, inputs.owns[0], wrong)
        assert np.isnan(errors["rel_err"][0]) == seen
        assert (errors["lse_err"][1] > 0.9) == seen
        assert errors["lse_err"][0] < 1e-5


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("loops", [1, 3])
def test_a_step_of_layers_has_all_its_calls(loops, h200):
    """Even if one program takes several steps. The launches of one step are counted."""
    case = DenseDecode(16, 1, 2, 4096)
    programs = Programs(OP, case, pool_struct(), 6, loops, sharding=h200)
    expected = {"unrolled": 6, "scan": 1, "scan, graphs of 1": 1}
    found = {}
    for form in sections.FORMS:
        compiled, found[form] = sections.compile_step(programs, form, 6, 3, "cuda")
        text = compiled.as_text()
        assert text.count(f'"{DECODE}"') == expected[form]
        assert text.count('"jax_flashmla_tile_scheduler"') == 1
        assert not copies_in(text)
        assert text.count(" while(") == (form != "unrolled") + (loops > 1)
    assert found["unrolled"] == (1, 0)
    assert found["scan"][0] == 0
    assert found["scan"][1] >= 6
    assert found["scan, graphs of 1"][0] >= 6
    assert found["scan, graphs of 1"][1] == 0


@pytest.mark.parametrize("loops", [1, 3])
def test_layers_give_what_their_form_says(loops):
    """Unrolled, every layer's result; scanned, the last one's; each on its own pages."""
    count, distinct = 2, 2
    pool = OP.pool([SMOKE], lambda _: distinct)
    programs = Programs(OP, SMOKE, pool, count, loops)
    inputs = make_inputs(SMOKE, programs, pool, count)
    _, (first,) = OP.lists(SMOKE, pool[: SMOKE.pages()], 1)
    qs = [q for _, q in inputs.owns]
    tables = [first + i % distinct * SMOKE.pages() for i in range(count)]
    check = programs.check(1)
    for form, checked in (("unrolled", (0, 1)), ("scan", (1,))):
        compiled, _ = sections.compile_step(programs, form, count, distinct, "xla")
        arguments = qs, pool, jnp.asarray(first), inputs.shared
        step = DonatedRound(compiled, inputs.poisoned(count), arguments, count * loops)
        assert step.round.calls == count * loops
        step.round.enqueue()
        for i in checked:

            def error(table, i=i, step=step):
                found = check(pool, inputs.shared, (table, qs[i]), [step.results[i]])
                return float(found["rel_err"][0])

            assert error(tables[i]) < 5e-3
            assert i == 0 or error(tables[i - 1]) > 0.1


def test_launches_are_counted():
    text = """000: kCommandBuffer [source       | next=004 (1)]
    001: kCopy         [source | sink] kCopy
    003: kCustomCall   [source | sink] kCustomCall
004: kWhile         [prev=000 (1) | sink        ]
condition:
    005: kCustomKernel [source | sink] loop_compare_fusion
  body:
    000: kCommandBuffer [source | sink]
        006: kCustomKernel [source       | next=007 (1)] loop_add_fusion
        008: kCustomCall   [prev=006 (2) | sink        ] kCustomCall
    009: kCustomCall [source | sink]
010: kCopy [source | sink]
"""
    assert launches.count_launches(text, 61) == (62, 62)


@pytest.mark.usefixtures("compiled_kernels")
def test_the_scratch_of_fixed_splits_is_what_a_call_needs(h200):
    """That of a whole round, whose calls share it."""
    case, size = DenseDecode(16, 1, 8, 8192), 1024
    form = sections.fixed_form(size)
    programs = Programs(form.op, case, pool_struct(pages=5000), 3, sharding=h200)
    compiled = programs.lower_round("cuda", "given").compile()
    scratch = sections.scratch_bytes(case.row() | form.columns(case))
    assert 0 <= compiled.memory_analysis().temp_size_in_bytes - scratch <= 2**15


# -------------------- They run, and are reported


@pytest.fixture(scope="module")
def dense_results(tmp_path_factory):
    """The file of both scripts. Their arrays are freed without the garbage collector."""
    path, before = tmp_path_factory.mktemp("dense") / "cpu.json", jax.live_arrays()
    gc.disable()
    try:
        options = ["--smoke", "--repeats", "1", "--out", str(path)]
        assert dense.bench.main(OP, dense.__doc__, options) == 0
        assert dense.bench.main(OP, "Sections", options, sections=sections.SECTIONS) == 0
        left = [array for array in jax.live_arrays() if not any(array is old for old in before)]
    finally:
        gc.enable()
    assert not left  # the next section needs the memory at once
    return path


def test_dense_decode_runs(dense_results):
    data = read(dense_results)
    assert data["errors"] == []
    found = {name: report.of(data["rows"], OP.name, name) for name in ("table", *sections.SECTIONS)}
    assert [row["case"] for row in found["table"]] == [case.name for case in OP.smoke]
    for row in found["table"]:
        assert row.keys() >= {
            "op", "dtype", "page_block_size", "h_q", "s_q", "batch", "mean_len", "varlen", "us",
            "us_with_schedule", "floor_us", "of_floor", "peer", "peer_us", "ratio", "rel_err",
            "lse_err", "jax_us", "plain_us", "sustained_us", "sustained_mhz", "sustained_watts",
            "host_bound",
        }  # fmt: skip
    assert [row["form"] for row in found["layers"]] == list(sections.FORMS)
    variants = [(row["dtype"], row["page_block_size"]) for row in found["variants"]]
    assert variants == [("fp16", 64), ("bf16", 16)]
    (fixed,) = found["fixed"]
    assert (fixed["fixed_split_size"], fixed["num_parts"]) == (256, 2)
    assert len(found["growth"]) == 1
    for row in data["rows"]:
        assert row["rel_err"] < 5e-3
        assert row["lse_err"] < 1e-4


def test_dense_decode_is_reported(dense_results, tmp_path):
    folder = str(dense_results.parent)
    pages.main(["--card", "cpu", "--results", folder, "--docs", str(tmp_path)])
    text = (tmp_path / "performance_cpu.md").read_text()
    assert "| 2 x 100 |" in text
    for title in (
        "Under sustained load", "Beside plain JAX", "A step of 2 layers", "fp16 and page sizes",
        "Splits of a fixed size", "Growth with batch and length",
    ):  # fmt: skip
        assert f"\n### {title}\n" in text
    assert "growth_cpu.svg" in text
    assert pages.main(["--card", "cpu", "--results", folder, "--gate"]) == 1  # cases are missing


def test_sections_go_on_where_they_were_stopped(dense_results, tmp_path, capsys):
    data = read(dense_results)
    for row in data["rows"]:
        row["commit"] = "abc"
    data["rows"] = [row for row in data["rows"] if row["section"] != "fixed"]
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(data))
    options = ["--smoke", "--repeats", "1", "--commit", "abc", "--out", str(path)]
    dense.bench.main(OP, "Sections", options, sections=sections.SECTIONS)
    assert re.findall(r"^(h4\S*, [^0-9]*) ", capsys.readouterr().out, re.MULTILINE) == [
        "h4-s1-2x100, splits of"
    ]
    assert len(read(path)["rows"]) == len(data["rows"]) + 1


def test_fixed_splits_are_reported_with_their_scratch():
    stamp = {"op": OP.name, "section": "fixed", "commit": "1"}
    row = stamp | DenseDecode(16, 1, 128, 4096).row() | {
        "us": 150.0, "twin_us": 125.0, "to_twin": 1.2, "rel_err": 2e-3, "fixed_split_size": 1024,
        "num_parts": 1280,
    }  # fmt: skip
    page = report.Page("H200", "", "0")
    sections.report_on(page, [row], None)
    scratch = 1280 * (2 * 16 * (1024 + 20) + 128)
    line = f"| 128 x 4096, h_q 16, s_q 1 | 1024 | 150.0 | 125.0 | +20.0% | {scratch / 1e6:.1f} |"
    assert line in str(page)
    assert "Measured at commit `1`" in " ".join(str(page).split())


def test_a_script_runs_by_itself(tmp_path):
    """Two devices against one: in a process of its own, which has two."""
    results = tmp_path / "x2.json"
    command = [sys.executable, BENCHMARKS / "bench_parallel.py", "--smoke", "--repeats", "1",
               "--out", results]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, check=True, capture_output=True, timeout=300, text=True, env=environment
    )
    rows = read(results)["rows"]
    assert [row["kind"] for row in rows] == ["data", "tensor", "context"]
    for row in rows:
        assert row["rel_err"] < 5e-3
        assert row["lse_err"] < 1e-4
        assert row["speedup"] == pytest.approx(row["one_us"] / row["two_us"], abs=2e-3)
        assert f"{row['speedup']:.2f}x" in done.stdout
    exchanged = 2 * 2 * 2 * (512 * 2 + 4)  # rows of 512 columns in bf16, and a float32
    assert [row["exchanged_bytes"] for row in rows] == [0, 0, exchanged]


# -------------------- The attention of a chunk


def test_the_attention_of_a_chunk_runs(tmp_path):
    """The op and both forms of the library call agree with float32. There is no cuDNN here."""
    path = tmp_path / "cpu.json"
    case = chunks.OP.smoke[0]
    options = ["--smoke", "--repeats", "3", "--cases", case.name, "--out", str(path)]

    def find(options):
        return chunks.JaxPeer("library", chunks.expanded, ["xla", "xla_split", "cudnn"])

    op = dataclasses.replace(chunks.OP, peers=[find])
    assert chunks.bench.main(op, "Chunks", options) == 0
    (row,) = read(path)["rows"]
    assert row["rel_err"] < 5e-3
    assert row["peer_rel_err"] < 1e-2  # the limit of a run; xla_split rounds two halves to bf16
    assert row["peer_us"] == min(row["peer_xla_us"], row["peer_xla_split_us"])
    assert "peer_cudnn_us" not in row


@pytest.mark.parametrize("context", [64, 128])
@pytest.mark.parametrize("way", ["xla", "xla_split"])
def test_expanded_attention_is_causal_at_the_end_of_the_context(way, context):
    """In float32. A mask that is off by one would be seen."""
    case = dataclasses.replace(chunks.OP.smoke[0], context=context)
    pool = jax.tree.map(lambda x: x.astype(jnp.float32), chunks.make_pool([case], lambda _: 1))
    lengths, (table,) = chunks.make_lists(case, pool, 1)
    q = chunks.draw_queries(case, jax.random.key(2)).astype(jnp.float32)
    found = chunks.expanded(way, pool, lengths, (table, q))
    assert chunks.check_results(case, pool, lengths, (table, q), [found])["rel_err"][0] < 1e-4
    off_by_one = chunks.expanded(way, pool, lengths, (table, jnp.roll(q, 1, axis=1)))
    error = chunks.check_results(case, pool, lengths, (table, jnp.roll(q, 1, 1)), [found])
    assert error["rel_err"][0] > 0.1
    assert off_by_one[0].shape == found[0].shape


@pytest.mark.usefixtures("compiled_kernels")
def test_a_round_of_chunks_is_launched_in_graphs(h200):
    """So that the host keeps up; nothing is copied."""
    case, calls = chunks.OP.cases[0], 4
    up = jax.ShapeDtypeStruct((16, 128, 512), jnp.bfloat16)
    pool = {"cache": pool_struct(), "key_up": up, "value_up": up}
    programs = Programs(chunks.OP, case, pool, calls, sharding=h200)
    compiled, counts = launches.compile_and_count(programs.lower_round("cuda", "given"), 1, {})
    text = compiled.as_text()
    assert re.findall(r'"(jax_flashmla_\w+)"', text) == [DECODE] * calls
    assert not copies_in(text, (1000, 64, 1, 576))
    assert 1 <= counts[0] <= 2
    assert counts[1] < 10


def test_the_reference_of_a_chunk_is_attention():
    """Beside softmax(q k^T) v in float64, one head and query at a time."""
    case = dataclasses.replace(chunks.OP.smoke[0], context=128, chunk=64)
    pool = chunks.make_pool([case], lambda _: 1)
    lengths, (table,) = chunks.make_lists(case, pool, 1)
    q = chunks.draw_queries(case, jax.random.key(2))
    entries, key_up, value_up, queries = (
        np.asarray(x, np.float64)
        for x in (pool["cache"][table[0]], pool["key_up"], pool["value_up"], q)
    )
    entries, expected = entries.reshape(128, -1), np.empty((1, 64, 2, 128))
    for n in range(64):
        seen = entries[: 64 + n + 1]
        for h in range(2):
            keys = np.concatenate([seen[:, :512] @ key_up[h].T, seen[:, 512:]], axis=1)
            weights = np.exp(keys @ queries[0, n, h] / 192**0.5)
            expected[0, n, h] = weights / weights.sum() @ (seen[:, :512] @ value_up[h].T)
    found = [(jnp.asarray(expected, jnp.float32),)]
    assert chunks.check_results(case, pool, lengths, (table, q), found)["rel_err"][0] < 1e-5


# -------------------- A whole model


@pytest.fixture
def quick_compiles():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compiles")
def test_the_benchmark_of_a_model_runs_and_is_reported(tmp_path, capsys):
    path = tmp_path / "cpu_model.json"
    assert bench_model.main(["--smoke", "--out", str(path), "--budget", "0"]) == 1
    assert "out of time: 14 figures are left out" in capsys.readouterr().out
    assert read(path)["rows"] == []
    options = ["--smoke", "--out", str(path), "--commit", "abc"]
    assert bench_model.main(options) == 0
    data = read(path)
    steps = {row["case"]: row for row in report.of(data["rows"], "model", "step")}
    assert list(steps) == [
        f"{form} {batch} x {n}"
        for batch in (1, 2) for form in ("cuda", "without", "plain") for n in (64, 128)
    ]  # fmt: skip
    for row in steps.values():
        assert row["cache_bytes"] == row["batch"] * row["context"] * 2 * 576 * 4
        a_second = row["batch"] / row["ms"] * 1e3
        assert row["tokens_per_s"] == pytest.approx(a_second, rel=1e-3, abs=0.06)  # to a tenth
    prompts = report.of(data["rows"], "model", "prefill")
    for row in prompts:
        assert row["tokens_per_s"] == pytest.approx(64 / row["ms"] * 1e3, rel=1e-2)
    capsys.readouterr()
    assert bench_model.main([*options, "--sections", "prefill"]) == 0
    assert "0 programs" in capsys.readouterr().out  # all is measured
    page = report.Page("CPU", "", "abc")
    bench_model.report_on(page, data)
    forms = "cuda", "without", "plain"
    cuda, without, plain = (steps[f"{form} 1 x 128"]["ms"] for form in forms)
    tokens = steps["cuda 1 x 128"]["tokens_per_s"]
    line = (
        f"| 1 x 128 | 0.0 | {cuda:.2f} | {tokens:.0f} | {1 - without / cuda:.0%} | {plain:.2f} | "
    )
    assert f"{line}{1 - without / plain:.0%} | {plain / cuda:.1f} |" in str(page)
    assert f"| 64 | 32 | {prompts[1]['ms']:.1f} | {prompts[1]['tokens_per_s']:.0f} |" in str(page)


class FakeProgram:
    """A program that raises, or gives back its state."""

    def __init__(self, error=None):
        self.error = error

    def compile(self):
        return self

    def memory_analysis(self):
        return type("Analysis", (), {"temp_size_in_bytes": 7})


@pytest.fixture
def model_run(tmp_path):
    options = bench_model.parse(
        bench_model.parser_of("Model", bench_model.SECTIONS),
        ["--smoke", "--out", str(tmp_path / "results.json"), "--commit", "abc"],
        bench_model.SECTIONS,
    )
    return Run(options, "_model")


def test_figures_of_a_model_that_cannot_be_measured(model_run, monkeypatch):
    """Out of memory, or no room for the cache. Any other error is raised."""
    plan = bench_model.smoke_plan()
    limit = bench_model.WORKSPACE + bench_model.cache_bytes(plan, 2, 64)
    figures = list(bench_model.step_figures(plan, {}, limit))
    monkeypatch.setattr(bench_model, "lower_form", lambda *_: FakeProgram())
    figures = [
        dataclasses.replace(f, lower=f.lower and FakeProgram, measure=fake_measure(f.case))
        for f in figures
    ]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        bench_model.measure(model_run, plan, figures)
    found = {row["case"]: row.get("why", row.get("ms")) for row in model_run.results.rows}
    assert found == {
        "cuda 1 x 64": 2.0, "cuda 1 x 128": "out of memory", "without 1 x 64": 2.0,
        "without 1 x 128": 2.0, "plain 1 x 64": 2.0, "plain 1 x 128": 2.0, "cuda 2 x 64": 2.0,
        "cuda 2 x 128": "does not fit",
    }  # fmt: skip
    page = report.Page("CPU", "", "abc")
    bench_model.report_on(page, model_run.results.data | {"weights_bytes": 0})
    assert "| 1 x 128 | 0.0 | out of memory |" in str(page)
    assert "| 2 x 128 | 0.0 | does not fit |" in str(page)


def fake_measure(case):
    error = {"cuda 1 x 128": "RESOURCE_EXHAUSTED: no", "without 2 x 64": "INTERNAL: no"}.get(case)

    def measure(program, state):
        if error:
            raise jax.errors.JaxRuntimeError(error)
        return {"ms": 2.0}

    return measure


def test_unknown_sections_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--sections", "step,prompts"])
    assert "not prompts" in capsys.readouterr().err


def test_plain_jax_is_timed_at_every_batch():
    plan = bench_model.full_plan()
    cases = [figure.case for figure in bench_model.step_figures(plan, {}, math.inf)]
    assert cases == [
        f"{form} {batch} x {n}" for batch in (1, 32, 128) for form in ("cuda", "without", "plain")
        for n in (1024, 8192, 32768)
    ]  # fmt: skip


def test_plain_jax_has_a_table_of_its_own_context():
    """It reads all of the table; the kernel reads what is there."""
    figures = list(bench_model.step_figures(bench_model.full_plan(), {}, 120e9))
    tables = {figure.case: figure.state for figure in figures if figure.lower is not None}
    for n in (1024, 8192, 32768):
        assert tables[f"cuda 32 x {n}"] == (32, 32768)
        assert tables[f"plain 32 x {n}"] == (32, n)
    assert len({figure.program for figure in figures if figure.columns["form"] == "plain"}) == 9


# -------------------- FlashMLA, with a fake PyTorch


def test_flashmla_is_replayed_from_a_graph(monkeypatch, tmp_path):
    """Its schedule is made beforehand; every call of a round has inputs of its own."""
    case, calls = OP.smoke[1], 3
    pool = OP.pool([case], lambda _: calls)
    inputs = make_inputs(case, Programs(OP, case, pool, calls), pool, calls)
    pool = pool.astype(jnp.float32)  # NumPy hands over no bfloat16
    owns = [(table, q.astype(jnp.float32)) for table, q in inputs.owns]

    def op(q, pool, d_v, lengths, table, scale, causal, schedule, splits, _):
        assert (d_v, scale, causal) == (512, 576**-0.5, True)
        results = dense.call(case, "xla", *map(jnp.asarray, (pool, lengths)), None,
                             (jnp.asarray(table), jnp.asarray(q)))  # fmt: skip
        return *results, schedule or "schedule", splits or "splits"

    torch = FakeTorch({"_flashmla_C": {"dense_decode_fwd": op}})
    monkeypatch.setitem(sys.modules, "torch", torch)
    library = tmp_path / "vllm" / "_flashmla_C.abi3.so"
    library.parent.mkdir()
    library.touch()
    monkeypatch.setenv("FLASHMLA_SO", str(library))
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    peer = OP.peers[0](types.SimpleNamespace(smoke=False, vllm=None))
    assert peer.name == "FlashMLA (vllm 0.33.0)"
    assert peer.ways(dataclasses.replace(case, page_block_size=16)) is None
    assert peer.ways(case) == [""]
    round_, results = peer.prepare(case, "", pool, inputs.shared, owns)
    (graph,) = torch.graphs
    assert round_.calls == len(graph.calls) == calls
    assert all(args[-3:-1] == ("schedule", "splits") for _, args, _ in graph.calls)
    for own, result in zip(owns, results, strict=True):  # as of a replay, not of the capture
        errors = dense.check_results(case, pool, inputs.shared, own, [result])
        assert errors["rel_err"][0] < 1e-5
        assert errors["lse_err"][0] < 1e-5
    out = graph.calls[0][2][0]
    out[...] = np.nan
    round_.enqueue()
    assert not np.isnan(out).any()


def test_a_peer_that_does_not_load_is_left_out(monkeypatch, capsys):
    monkeypatch.setenv("FLASHMLA_SO", "nowhere.so")
    options = dense.bench.parse_arguments("Dense.", ["--smoke"], ["table"])
    assert Machine(OP, options).peers == []
    assert capsys.readouterr().out == ""  # nothing is looked for
    options.smoke = False
    assert Machine(OP, options).peers == []
    assert "no peer, timing without it: FileNotFoundError" in capsys.readouterr().out
