"""The benchmark's own rules: floors, inputs, gate and goals; and that it runs, on the CPU."""

import copy
import dataclasses
import gc
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import DECODE, SCHEDULE_AND_DECODE, copies_in

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
COLUMNS = {
    "op", "dtype", "page_block_size", "h_q", "s_q", "batch", "mean_len", "varlen", "us",
    "us_with_metadata", "floor_us", "of_floor", "peer", "peer_us", "ratio", "rel_err",
}  # fmt: skip


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import workloads

    return workloads


@pytest.fixture
def bench(workloads):
    """Imports a module of the benchmark by its name."""
    return importlib.import_module


@pytest.fixture
def report(bench):
    return bench("report")


def passing_results(workloads):
    """Results in which every case just passes, for a test to spoil."""
    rows = []
    for case, stored in workloads.stored_peers().items():
        us = stored["flashmla_us"]
        rows.append(
            case.row() | {
                "us": us, "us_with_metadata": us + 3, "floor_us": case.floor_us(),
                "of_floor": case.floor_us() / us, "peer": "peer", "peer_us": us, "ratio": 1.0,
                "rel_err": 2e-3,
            }
        )  # fmt: skip
    return {"device": "NVIDIA H200", "commit": "0", "ceilings": {}, "rows": rows}


def test_cases_agree_with_the_stored_measurements(workloads):
    assert len(workloads.all_cases()) == 113
    for case, stored in workloads.stored_peers().items():
        assert sum(case.lengths()) == stored["sum_len"]
        assert case.floor_us() == pytest.approx(stored["floor_us"], abs=0.006)
        assert case.causal == stored["causal"]


def test_a_card_has_its_floors_and_its_file(workloads, bench):
    cards = bench("cards")
    h200, h100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    names = [cards.results_path(kind).name for kind in (h200, h100, "NVIDIA GH200 480GB", "cpu")]
    assert names == ["h200.json", "h100.json", "nvidia_gh200_480gb.json", "cpu.json"]
    assert cards.results_path(h100, "_model").name == "h100_model.json"
    assert cards.card_of(f"{h100}, 132 SMs, jax 0.11.2") is cards.H100
    assert cards.card_of(f"{h200}, jax 0.11.2") is cards.H200
    reads, computes = workloads.Case(16, 1, 128, 4096), workloads.Case(128, 2, 128, 4096)
    assert reads.floor_us(cards.H100) == pytest.approx(reads.floor_us() * 4.55 / 3.15)
    assert computes.floor_us(cards.H100) == computes.floor_us()
    assert reads.floor_us(cards.card_of("another")) == reads.floor_us()


@pytest.mark.parametrize(
    ("device", "name", "speed"),
    [("NVIDIA H100 80GB HBM3", "H100", "3.15"), ("NVIDIA GH200 480GB",) * 2 + ("4.55",)],
)
def test_another_card_is_not_judged_by_figures_of_an_h200(
    device, name, speed, workloads, report, capsys
):
    results = passing_results(workloads) | {"device": f"{device}, jax 0.11.2"}
    for row in results["rows"]:
        row["peer_us"] *= 1.5
    assert report.gate_failures(results) == []
    assert report.print_gate(results)
    assert "best stored peer" not in capsys.readouterr().out
    assert not report.print_goals(results)
    assert capsys.readouterr().out.startswith("the goals are of an H200")
    text = report.page_text(results, "file", "plot", "growth")
    assert f"# Performance on one {name}\n" in text
    assert f"{speed} TB/s" in text
    assert "## Goals" not in text
    results["device"] = "NVIDIA H200, jax 0.11.2"
    assert len(report.gate_failures(results)) > 10
    assert "## Goals" in report.page_text(results, "file", "plot", "growth")


def test_input_sets_are_too_large_for_the_l2(workloads):
    for case in workloads.all_cases():
        assert case.calls * sum(case.lengths()) * workloads.HEAD_DIM_K * 2 >= 256e6


def test_a_uniform_case_and_its_ragged_twin_share_their_shapes(workloads):
    twins = [workloads.Case(16, 1, 128, 4096, varlen=varlen) for varlen in (False, True)]
    assert len({(case.shape_key, case.calls, case.table_width) for case in twins}) == 1


def test_page_tables_share_no_page_while_the_pool_lasts(workloads):
    case = workloads.Case(4, 1, 3, 200, varlen=True)
    tables = workloads.page_tables(case, 4 * case.pages(), 4)
    counts = [-(-length // 64) for length in case.lengths()]
    used = [table[i, :count] for table in tables for i, count in enumerate(counts)]
    assert sorted(np.concatenate(used)) == list(range(4 * case.pages()))


def test_the_gate_passes_what_meets_it(workloads, report):
    assert report.gate_failures(passing_results(workloads)) == []


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ((16, 1, 64, 8192), {"ratio": 0.969}, "ratio 0.969 < 0.97"),
        ((16, 1, 1, 4096), {"ratio": 0.899}, "ratio 0.899 < 0.9"),
        ((16, 1, 1, 4096), {"rel_err": float("nan")}, "rel_err nan"),
        ((16, 1, 128, 4096), {"peer_us": 200.0}, "void"),
        ((16, 1, 128, 4096), {"ratio": None, "peer_us": None}, "no peer"),
    ],
)
def test_the_gate_stops_what_misses_it(workloads, report, case, change, message):
    results = passing_results(workloads)
    for row in results["rows"]:
        if workloads.case_of(row) == workloads.Case(*case):
            row.update(change)
    (failure,) = report.gate_failures(results)
    assert message in failure


def test_the_gate_misses_absent_cases(workloads, report):
    results = copy.deepcopy(passing_results(workloads))
    del results["rows"][5]
    assert len(report.gate_failures(results)) == 1


def test_overlap_of_calls_is_found(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import overlap

    apart = [("decode", 0.0, 5.0), ("combine", 4.0, 6.0), ("decode", 7.0, 12.0)]
    apart.append(("combine", 11.0, 13.0))
    assert overlap.summarize(apart, 2)[1] == 0
    assert overlap.summarize([("decode", 0.0, 5.0), ("decode", 4.5, 9.0)], 2)[1] == 0.5
    assert overlap.summarize(apart, 3)[1] is None


@pytest.mark.parametrize("made_in_call", [False, True])
@pytest.mark.usefixtures("compiled_kernels")
def test_short_rounds_run_in_a_loop(made_in_call, workloads, bench, h200):
    """All calls stay in its body, nothing is copied, and a turn is one graph."""
    case, calls, loops = workloads.Case(16, 1, 2, 4096), 5, 7
    shapes = bench("rounds").Shapes(case, 1000, calls, loops, sharding=h200)
    lowered = shapes.lower_round("cuda", made_in_call)
    compiled, launches = bench("layers").compile_and_count(lowered, loops, {})
    text = compiled.as_text()
    body = re.search(r"while\(.*body=%?([\w.]+)", text)[1]
    body = re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    target = SCHEDULE_AND_DECODE if made_in_call else DECODE
    for part in (body, text):
        assert re.findall(r'"(jax_flashmla_\w+)"', part) == [target] * calls
    assert not copies_in(body)
    assert launches[0] == loops
    assert launches[1] <= 1  # the loop's counter, before it


def test_rounds_in_a_loop_give_what_one_gives(workloads, bench):
    rounds = bench("rounds")
    case = workloads.SMOKE[0]
    pool = rounds.make_pool([case], lambda _: 1)
    results = []
    for loops in (1, 3):
        shapes = rounds.Shapes(case, pool.shape[0], 1, loops)
        inputs = rounds.Inputs(case, shapes.draw(), pool, 1)
        metadata = shapes.metadata("xla")(inputs.lengths)
        op_round = rounds.OpRound(shapes.round("xla", False), inputs, metadata, 1, loops)
        assert op_round.round.calls == loops
        op_round.round.enqueue()
        results.append((op_round.outs, op_round.lses))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert not np.isnan(np.asarray(results[0][0][0], np.float32)).any()


def test_a_section_leaves_no_arrays_behind(bench, monkeypatch):
    """Without waiting for the garbage collector: the next section needs the memory at once."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the options set too
    options = bench("decode").parse_arguments(["--smoke", "--layers", "--fixed", "--repeats", "1"])
    results = bench("results_file").Results(None, "sections", "a device", "a commit")
    machine, before = bench("harness").Machine(options), jax.live_arrays()
    gc.disable()
    try:
        bench("runner").run_sections(options, machine, results, time.monotonic())
        left = [array for array in jax.live_arrays() if not any(array is old for old in before)]
    finally:
        gc.enable()
    assert not results.errors
    assert all(results.sections[section]["rows"] for section in ("layers", "fixed"))
    assert not left


def test_short_rounds_are_long_enough_to_dispatch(workloads):
    loops = {case: case.loops for case in workloads.all_cases()}
    assert loops[workloads.Case(16, 1, 1, 4096)] == 8
    assert loops[workloads.Case(16, 1, 128, 4096)] == 1
    for case, count in loops.items():
        assert case.calls * count * max(case.floor_us(), 6.0) >= 400


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("loops", [1, 3])
def test_a_step_of_layers_has_all_its_calls(loops, workloads, bench, h200):
    """Also where it is taken several times in one program; what is counted is one step."""
    layers, case = bench("layers"), workloads.Case(16, 1, 2, 4096)
    shapes = bench("rounds").Shapes(case, 1000, 6, loops, sharding=h200)
    expected = {"unrolled": (6, (1, 0)), "scan": (1, None), "scan, graphs of 1": (1, None)}
    found = {}
    for form in layers.FORMS:
        compiled, found[form] = layers.compile_step(shapes, form, 6, 3, "cuda")
        text = compiled.as_text()
        assert text.count('"jax_flashmla_dense_decode"') == expected[form][0]
        assert text.count('"jax_flashmla_tile_scheduler"') == 1
        assert not copies_in(text)
        assert text.count(" while(") == (form != "unrolled") + (loops > 1)
    assert found["unrolled"] == expected["unrolled"][1]
    assert found["scan"][0] == 0
    assert found["scan"][1] >= 6
    assert found["scan, graphs of 1"][0] >= 6
    assert found["scan, graphs of 1"][1] == 0


@pytest.mark.parametrize("loops", [1, 3])
def test_layers_give_what_their_form_says(loops, workloads, bench):
    """Unrolled, every layer's result; scanned, the last one's; each on its own pages."""
    layers, rounds = bench("layers"), bench("rounds")
    case, count, distinct = workloads.SMOKE[0], 2, 2
    pool = rounds.make_pool([case], lambda _: distinct)
    shapes = rounds.Shapes(case, pool.shape[0], count, loops)
    inputs = rounds.Inputs(case, shapes.draw(), pool, count)
    first = jnp.asarray(workloads.page_tables(case, case.pages(), 1)[0])
    tables = [first + i % distinct * case.pages() for i in range(count)]
    check = shapes.errors(1)
    for form, checked in (("unrolled", (0, 1)), ("scan", (1,))):
        compiled, _ = layers.compile_step(shapes, form, count, distinct, "xla")
        arguments = inputs.qs, pool, first, inputs.lengths
        buffers = inputs.poisoned(count)
        step = rounds.DonatedRound(compiled, buffers, arguments, count * loops)
        assert step.round.calls == count * loops
        step.round.enqueue()
        for i in checked:
            operands = (inputs.qs[i], tables[i], inputs.lengths, [step.outs[i]], [step.lses[i]])
            assert float(check(pool, *operands)[0][0]) < 5e-3
            other = (inputs.qs[i], tables[i - 1], inputs.lengths, [step.outs[i]], [step.lses[i]])
            assert i == 0 or float(check(pool, *other)[0][0]) > 0.1


def test_launches_are_counted(bench):
    count = bench("layers").count_launches
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
    assert count(text, 61) == (62, 62)


def test_growth_covers_its_range(workloads):
    cases = workloads.growth_cases()
    assert len(set(cases)) == len(cases)
    for heads in (16, 128):
        ours = [case for case in cases if case.h_q == heads]
        batches = {case.batch for case in ours if case.mean_len == 4096}
        assert {1, 2, 64, 1024, 4096} <= batches
        for batch, longest in ((1, 2**20), (128, 2**16)):
            lengths = {case.mean_len for case in ours if case.batch == batch}
            assert {64, 1024, longest} <= lengths
        assert {case.batch for case in ours if case.varlen} == {256, 1024, 4096}
    assert max(case.pages() for case in cases) * 64 <= workloads.MAX_GROWTH_TOKENS


def test_a_pool_too_small_for_a_call_raises(workloads):
    with pytest.raises(ValueError, match="needs 30 pages, the pool has 7"):
        workloads.page_tables(workloads.Case(4, 1, 3, 640), 7, 1)


def test_a_sample_of_sequences_is_checked(workloads, bench):
    """The first and the last are in it; what is not is not looked at."""
    case = workloads.Case(2, 1, 5, 64)
    rounds = bench("rounds")
    pool = rounds.make_pool([case], lambda _: 1)
    shapes = rounds.Shapes(case, pool.shape[0], 1)
    inputs = rounds.Inputs(case, shapes.draw(), pool, 1)
    metadata = shapes.metadata("xla")(inputs.lengths)
    op_round = rounds.OpRound(shapes.round("xla", False), inputs, metadata, 1)
    op_round.round.enqueue()
    check = shapes.errors(1, 3)
    for sequence, seen in ((0, True), (1, False), (2, True), (4, True)):
        wrong = op_round.outs[0].at[sequence].set(jnp.nan)
        error, _ = check(
            pool, inputs.qs[0], inputs.tables[0], inputs.lengths, [wrong], op_round.lses
        )
        assert np.isnan(float(error[0])) == seen


class FakeNvml:
    """Clock and power that fall from reading to reading."""

    def __init__(self, fails=False):
        self.readings, self.fails = 0, fails

    def mhz(self):
        if self.fails:
            raise OSError("no driver")
        self.readings += 1
        return 1980 if self.readings < 4 else 1500

    def watts(self):
        return 700.4


@pytest.mark.parametrize("nvml", [FakeNvml(), FakeNvml(fails=True), None])
def test_lasting_load_is_timed_and_read(nvml, bench, monkeypatch):
    """By a clock that a busy machine does not make late; the readings take real time."""
    power, timing = bench("power"), bench("timing")
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(power, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    meter = power.Meter(found=False)
    meter.nvml, pending = nvml, []

    def wait():
        time.sleep(sum(pending))
        clock.now += sum(pending)
        pending.clear()

    found = power.sustain(timing.Round(4, lambda: pending.append(0.004), wait), 1000, 0.06, meter)
    assert found.us == pytest.approx(1000)
    good = nvml is not None and not nvml.fails
    assert (found.mhz, found.watts) == ((1500, 700) if good else (None, None))
    assert not pending


def test_the_later_readings_count(bench):
    sampler = bench("power").Sampler(None)
    assert sampler.medians() == (None, None)
    sampler.samples = [(1980, 300.0)] * 5 + [(1500, 700.0)] * 4
    assert sampler.medians() == (1500, 700)


def test_the_probed_clock_counts_where_there_is_one(bench):
    power, timing = bench("power"), bench("timing")
    meter = power.Meter(found=False)
    meter.nvml, meter.probe = FakeNvml(), FakeNvml()
    meter.probe.mhz = lambda: 1612.3
    round_ = timing.Round(4, lambda: None, lambda: time.sleep(0.01))
    assert power.sustain(round_, 1000, 0.01, meter).mhz == 1612
    meter.probe = FakeNvml(fails=True)
    assert power.sustain(round_, 1000, 0.01, meter).mhz in (1980, 1500)


def test_the_power_limits_the_compute_bound_cases(workloads):
    cases = [case for case in workloads.all_cases() if workloads.is_sustained(case)]
    assert len(cases) == 19
    assert all(case.compute_us() > case.memory_us() for case in cases)


def results_at_the_goals(workloads, goals, ceilings):
    """Results in which every case just reaches the strictest of its goals."""
    rows = []
    for case in workloads.all_cases():
        limits = [
            regime.limit(case, ceilings)
            for regime in goals.REGIMES
            if regime.covers(case) and not regime.metadata
        ]
        us = 0.9999 * min(limit for limit in limits if limit is not None)
        rows.append(case.row() | {"us": us, "us_with_metadata": us + 2.9})
    layers = [
        case.row() | {"form": form, "us": 10.9, "alone_us": 10.0, "over": over}
        for case in workloads.LAYER_CASES
        for form, over in (("unrolled", 0.03), ("scan", 0.03), ("scan, graphs of 1", 1.0))
    ]
    variants = [
        dataclasses.replace(case, dtype=dtype, page_block_size=page).row() | {"to_twin": 1.019}
        for case in workloads.TWINS
        for dtype, page in workloads.VARIANTS
    ]
    return {
        "device": "NVIDIA H200", "commit": "0", "ceilings": ceilings, "rows": rows,
        "layers": {"commit": "0", "rows": layers}, "variants": {"commit": "0", "rows": variants},
    }  # fmt: skip


def test_goals_are_met_by_what_meets_them(workloads, bench, report, capsys):
    goals = bench("goals")
    results = results_at_the_goals(workloads, goals, workloads.stored_ceilings())
    assert goals.misses(results) == []
    assert report.print_goals(results)
    assert "the goals are met" in capsys.readouterr().out
    cells = goals.table_cells(results)
    assert all(met.split(" of ")[0] == met.split(" of ")[-1] for _, _, met, _ in cells[:-1])


@pytest.mark.parametrize(
    ("case", "us", "regime"),
    [
        ((16, 1, 64, 8192), 133.23 / 0.949, "bandwidth-bound, uniform"),
        ((64, 2, 128, 4096), 187.2 / 0.919, "compute-bound"),
        ((128, 2, 128, 1024), 93.6 / 0.95 + 4.6, None),
        ((16, 1, 128, 4096, True), 134.4 / 0.879, "short or ragged"),
        ((64, 2, 32, 4096), 46.8 / 0.849, "compute-bound, 32 x 4096"),
        ((128, 2, 1, 32768), 30.1, "small batch, 1 x 32768"),
        ((64, 1, 1, 131072), 75.7 / 1.49, "small batch, 1 x 131072 and 8 x 8192"),
        ((32, 1, 1, 4096), 8.1, "latency, 1 x 4096"),
    ],
)
def test_goals_are_missed_by_what_misses_them(workloads, bench, case, us, regime):
    goals = bench("goals")
    results = results_at_the_goals(workloads, goals, workloads.stored_ceilings())
    for row in results["rows"]:
        if workloads.case_of(row) == workloads.Case(*case):
            row |= {"us": us, "us_with_metadata": us}
    found = [line.split(": ")[0] for line in goals.misses(results)]
    assert found == [regime] if regime else "compute-bound, 128 x 1024" not in found


def test_metadata_and_missing_cases_are_goals_too(workloads, bench):
    goals = bench("goals")
    results = results_at_the_goals(workloads, goals, workloads.stored_ceilings())
    results["rows"][0]["us_with_metadata"] += 0.2
    results["rows"].pop()
    metadata, missing = goals.misses(results)
    assert metadata.startswith("metadata made by the call: h16-s1-1x4096 3.1 us")
    assert missing.endswith(": missing")


@pytest.mark.parametrize(
    ("section", "number", "change", "miss"),
    [
        ("layers", 0, {"over": 0.031}, "a step of 61 layers, 128 x 4096: h16-s1-128x4096 unrolled"),
        ("layers", 4, {"over": 0.031}, "a step of 61 layers, 128 x 4096: h128-s1-128x4096 scan"),
        ("layers", 2, {"over": 2.0}, None),
        ("layers", 6, {"us": 11.1}, "a step of 61 layers, 1 x 4096, unrolled: h16-s1-1x4096"),
        ("variants", 0, {"to_twin": 1.031}, "fp16: h16-s1-128x4096-fp16"),
        ("variants", 1, {"to_twin": 1.2}, None),
        ("variants", 2, {"to_twin": 1.051}, "pages of 32: h16-s1-128x4096-p32"),
        ("variants", 4, {"to_twin": 1.021}, "pages of 128 and 256: h16-s1-128x4096-p256"),
    ],
)
def test_sections_have_goals(workloads, bench, section, number, change, miss):
    goals = bench("goals")
    results = results_at_the_goals(workloads, goals, workloads.stored_ceilings())
    results[section]["rows"][number].update(change)
    lines = goals.misses(results)
    assert len(lines) == (miss is not None)
    assert all(line.startswith(miss) for line in lines)
    del results[section]
    assert all(line.endswith(": missing") for line in goals.misses(results))


def test_stored_figures_are_scaled_by_the_ceilings(workloads, bench):
    goals = bench("goals")
    stored = workloads.stored_ceilings()
    reads, computes = workloads.Case(16, 1, 128, 4096), workloads.Case(128, 1, 128, 4096)
    slow = {"read_gbs": stored["read_gbs"] / 1.02, "matmul_bf16_tflops": 500}
    assert goals.best_peer_us(reads, slow) == pytest.approx(1.02 * 148.9)
    assert goals.best_peer_us(computes, slow) == pytest.approx(1.05 * 231.1)
    fast = {key: 2 * value for key, value in slow.items()}
    assert goals.best_peer_us(reads, fast) == pytest.approx(0.95 * 148.9)
    assert goals.best_peer_us(reads, {}) == 148.9
    for case, row in workloads.stored_peers().items():
        assert goals.best_stored_us(case) == row.get("best_peer_us")


def test_sections_stay_until_they_are_measured_again(workloads, bench, tmp_path):
    Results = bench("results_file").Results
    path = tmp_path / "results.json"
    case = workloads.Case(16, 1, 1, 4096)
    first = Results(path, False, "GPU", "1")
    first.add(case, case.row() | {"us": 1.0})
    first.begin("growth")
    first.add_to("growth", {"us": 2.0})
    only_layers = Results(path, "sections", "GPU", "2")
    only_layers.begin("layers")
    only_layers.add_to("layers", {"us": 3.0})
    data = json.loads(path.read_text())
    assert data["commit"] == "1"
    assert [row["us"] for row in data["rows"]] == [1.0]
    assert data["growth"] == {"commit": "1", "rows": [{"us": 2.0}]}
    assert data["layers"] == {"commit": "2", "rows": [{"us": 3.0}]}
    table = Results(path, False, "GPU", "3")
    table.add(case, case.row() | {"us": 4.0})
    data = json.loads(path.read_text())
    assert (data["commit"], len(data["rows"]), data["layers"]["commit"]) == ("3", 1, "2")
    Results(path, "sections", "another GPU", "3").save()
    assert "layers" not in json.loads(path.read_text())


def test_the_benchmark_runs_and_is_reported(tmp_path):
    results, docs = tmp_path / "cpu.json", tmp_path / "docs"
    decode = [sys.executable, BENCHMARKS / "decode.py", "--smoke", "--all", "--out", results]
    subprocess.run(decode, check=True, capture_output=True, timeout=300)
    data = json.loads(results.read_text())
    sections = {"layers", "variants", "fixed", "growth"}
    assert {"device", "commit", "ceilings", "rows"} | sections == data.keys()
    for row in data["rows"]:
        assert row.keys() >= COLUMNS | {"sustained_us", "sustained_mhz", "sustained_watts"}
        assert row["rel_err"] < 5e-3
    forms = ["unrolled", "scan", "scan, graphs of 1"]
    assert [row["form"] for row in data["layers"]["rows"]] == forms
    variants = [(row["dtype"], row["page_block_size"]) for row in data["variants"]["rows"]]
    assert variants == [("fp16", 64), ("bf16", 16)]
    (fixed,) = data["fixed"]["rows"]
    assert (fixed["fixed_split_size"], fixed["num_parts"]) == (256, 2)
    for name in sections:
        assert all(row["rel_err"] < 5e-3 for row in data[name]["rows"])
    command = [sys.executable, BENCHMARKS / "report.py", "--results", results, "--docs", docs]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    text = (docs / "performance_cpu.md").read_text()
    assert "2 x 100" in text
    for title in (
        "Under lasting load",
        "A step of 2 layers",
        "fp16 and page sizes",
        "Splits of a fixed size",
        "How it grows",
    ):
        assert f"\n## {title}\n" in text
    for plot in ("performance_cpu.svg", "growth_cpu.svg"):
        assert plot in text
        assert (docs / plot).stat().st_size > 1000


def test_fixed_splits_are_reported_where_they_were_measured(workloads, report):
    results = passing_results(workloads)
    assert "fixed size" not in report.page_text(results, "file", "plot", "growth")
    row = workloads.Case(16, 1, 128, 4096).row() | {
        "us": 150.0, "twin_us": 125.0, "to_twin": 1.2, "rel_err": 2e-3, "fixed_split_size": 1024,
        "num_parts": 1280,
    }  # fmt: skip
    results["fixed"] = {"commit": "1", "rows": [row]}
    text = report.page_text(results, "file", "plot", "growth")
    scratch = 1280 * (2 * 16 * (1024 + 20) + 128)
    line = f"| 128 x 4096, h_q 16, s_q 1 | 1024 | 150.0 | 125.0 | +20.0% | {scratch / 1e6:.1f} |"
    assert line in text
    assert "Measured at commit `1`" in text


@pytest.mark.usefixtures("compiled_kernels")
def test_the_scratch_of_fixed_splits_is_what_a_call_needs(workloads, bench, h200):
    """That of a whole round, whose calls share it."""
    case, size = workloads.Case(16, 1, 8, 8192), 1024
    shapes = bench("rounds").Shapes(case, 5000, 3, sharding=h200, fixed_split_size=size)
    compiled = shapes.lower_round("cuda", False).compile()
    scratch = workloads.scratch_bytes(case.row() | {"num_parts": case.fixed_parts(size)})
    assert 0 <= compiled.memory_analysis().temp_size_in_bytes - scratch <= 2**15


def test_the_benchmark_of_two_devices_runs(tmp_path):
    results = tmp_path / "x2.json"
    command = [sys.executable, BENCHMARKS / "parallel.py", "--smoke", "--out", results]
    shown = subprocess.run(command, check=True, capture_output=True, timeout=300, text=True).stdout
    rows = json.loads(results.read_text())["rows"]
    assert [row["kind"] for row in rows] == ["data", "tensor", "context"]
    for row in rows:
        assert row["rel_err"] < 5e-3
        assert row["speedup"] == pytest.approx(row["one_us"] / row["two_us"], abs=2e-3)
        assert f"{row['speedup']:.2f}x" in shown
    exchanged = 2 * 2 * 2 * (512 * 2 + 4)  # rows of 512 columns in bf16, and a float32
    assert [row["exchanged_bytes"] for row in rows] == [0, 0, exchanged]


def run_model_benchmark(*arguments):
    command = [sys.executable, BENCHMARKS / "model.py", "--smoke", *map(str, arguments)]
    quick = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, timeout=300, env=quick)
    return done.stdout.decode()


def test_the_benchmark_of_a_model_runs_and_is_reported(tmp_path, report):
    results = tmp_path / "cpu_model.json"
    run_model_benchmark("--out", results)
    data = json.loads(results.read_text())
    assert [(row["batch"], row["context"]) for row in data["rows"]] == [
        (1, 64), (1, 128), (2, 64), (2, 128),
    ]  # fmt: skip
    for row in data["rows"]:
        assert row["missing"] == {}
        assert row["cache_bytes"] == row["batch"] * row["context"] * 2 * 576 * 4
        a_second = row["batch"] / row["cuda_ms"] * 1e3
        assert row["tokens_per_s"] == pytest.approx(a_second, rel=1e-3, abs=0.06)  # to a tenth
        assert ("xla_ms" in row) == (row["batch"] == 1)
        without, share = row["without_ms"], row["attention_share"]
        assert share == pytest.approx(1 - without / row["cuda_ms"], abs=1e-3)
    for row in data["prefill"]:
        assert row["tokens_per_s"] == pytest.approx(64 / row["ms"] * 1e3, rel=1e-2)
    for row in data["prefill_attention"]:
        ((name, reason),) = row["missing"].items()  # there is no cuDNN on a CPU
        assert name == "cudnn"
        assert reason.startswith("refused: ")
        assert row["op_us"] > 0
        for form in ("cudnn_split", "xla"):
            assert row[f"{form}_us"] > 0
            assert 0 < row[f"{form}_difference"] < 1e-4
    text = report.model_section(data)
    row = data["rows"][3]
    assert f"| 2 x 128 | 0.0 | {row['cuda_ms']:.2f} | {row['tokens_per_s']:.0f} |" in text
    row = data["prefill"][1]
    assert f"| 64 | 32 | {row['ms']:.1f} | {row['tokens_per_s']:.0f} |" in text
    row = data["prefill_attention"][1]
    times = [f"{row[f'{form}_us']:.1f}" for form in ("op", "cudnn_split", "xla")]
    assert f"| 128 | 64 | {times[0]} | refused | {times[1]} | {times[2]} |" in text


def test_the_benchmark_of_a_model_says_what_it_left_out(tmp_path, report):
    results = tmp_path / "cpu_model.json"
    assert "figures of 8 rows are left out" in run_model_benchmark("--out", results, "--budget", 0)
    data = json.loads(results.read_text())
    names = {"cuda": "left out", "without": "left out"}
    assert [row["missing"] for row in data["rows"]] == [names | {"xla": "left out"}] * 2 + [
        names
    ] * 2
    text = report.model_section(data)
    assert "| 1 x 64 | 0.0 | left out |  |  | left out |" in text
    assert "| 64 | 16 | left out |" in text
    assert "| 128 | 64 | left out | left out | left out | left out |  |  |" in text
    shown = run_model_benchmark("--out", results, "--budget", 0, "--sections", "prefill")
    assert "figures of 2 rows are left out" in shown


def test_unknown_sections_are_refused(bench, capsys):
    model = bench("model")
    assert model.parse_arguments(["--sections", "rows,prefill"]).sections == ["rows", "prefill"]
    with pytest.raises(SystemExit):
        model.parse_arguments(["--sections", "rows,prompts"])
    assert "not prompts" in capsys.readouterr().err


def test_a_model_is_reported_without_the_attention_of_chunks(report):
    """A file may be older than that section."""
    data = report.read_results(BENCHMARKS / "results/h200_model.json")
    data["prefill_attention"] = []
    text = report.model_section(data)
    del data["prefill_attention"]
    assert report.model_section(data) == text
    assert "dot_product_attention" not in text
    row = {
        "context": 4096, "chunk": 64, "missing": {"xla": "out of memory"}, "op_us": 50.0,
        "cudnn_us": 200.0, "cudnn_difference": 1e-3, "cudnn_split_us": 150.0,
        "cudnn_split_difference": 5e-3,
    }  # fmt: skip
    text = report.model_section(data | {"prefill_attention": [row]})
    line = "| 4096 | 64 | 50.0 | 200.0 | 150.0 | out of memory | 3.00 | 5.0e-03 |"
    assert text.endswith(line)


def test_plain_jax_is_timed_at_every_batch(bench):
    forms = {form.name: form.batches for form in bench("model").full_plan().forms}
    assert forms["xla"] == forms["cuda"] == (1, 32, 128)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("split", [False, True])
def test_expanded_attention_is_that_of_the_latents(bench, implementation, split):
    """Beside softmax(q k^T) v in float64, without pages; a mask that is off by one shows."""
    model, attention = bench("model"), bench("prefill_attention")
    config, rng = model.smoke_plan().config, np.random.default_rng(0)
    s, n, page = 24, 8, 4

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    heads, c = config.heads, config.kv_lora_rank
    w = {
        "key_up": normal(heads, config.nope_dim, c) / c**0.5,
        "value_up": normal(heads, config.value_dim, c) / c**0.5,
    }
    q_nope, q_rope = normal(1, n, heads, config.nope_dim), normal(1, n, heads, config.rope_dim)
    cache, table = normal(2 * s // page, page, 1, config.entry_dim), rng.permutation(s // page)
    operands = w, q_nope, q_rope, cache, table[None].astype(np.int32)
    layers = cache.reshape(2, s // page, page, config.entry_dim)
    entries = layers[1, table].reshape(s, -1).astype(np.float64)  # of the last layer
    keys = np.einsum("sc,hec->hse", entries[:, :c], w["key_up"])
    logits = np.einsum("nhe,hse->hns", q_nope[0], keys)
    logits += np.einsum("nhe,se->hns", q_rope[0], entries[:, c:])
    seen = np.arange(s) <= s - n + np.arange(n)[:, None]
    weights = np.where(seen, np.exp(config.softmax_scale * logits), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("hns,sc,hvc->nhv", weights, entries[:, :c], w["value_up"])
    form = attention.AttentionForm("expanded", implementation, split=split)
    program = attention.lower_layers(form, config, 2, *operands).compile()
    found = program(*operands, np.float32(0))
    np.testing.assert_allclose(found[0], expected, atol=2e-5)


@pytest.mark.usefixtures("compiled_kernels")
def test_the_attention_of_a_chunk_is_a_graph_a_layer(bench, h200):
    """So that the host keeps up; in a model, XLA makes one graph of all."""
    attention, layers = bench("prefill_attention"), bench("layers")
    config = bench("model").full_plan().config

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=h200)

    up = struct(config.heads, 128, config.kv_lora_rank)
    operands = (
        {"key_up": up, "value_up": up}, struct(1, 64, config.heads, 128),
        struct(1, 64, config.heads, 64), struct(27 * 64, 64, 1, 576),
        struct(1, 64, dtype=jnp.int32),
    )  # fmt: skip
    for implementation, expanded in (("cuda", False), ("xla", True)):
        form = attention.AttentionForm("form", implementation, expanded)
        lowered = attention.lower_layers(form, config, 27, *operands)
        graphs, singles = layers.compile_and_count(lowered, 27, {})[1]
        assert 27 <= graphs <= 28
        assert singles < 10


def test_a_library_call_that_is_wrong_has_no_figure(tmp_path, bench):
    model = bench("model")
    plan = model.smoke_plan()
    programs = model.Programs(plan, {}, model.Budget(100))
    op, _, split, xla = plan.attention_forms
    row = {"context": 64, "chunk": 64, "missing": {form.name: "left out" for form in (op, split)}}
    head = {"device": "d", "commit": "c", "model": "m", "weights_bytes": 0}
    results, outs = model.Results(tmp_path / "results.json", head, plan, 1e9), {}
    double = jax.jit(lambda x: x * 1.01).lower(jnp.ones(3)).compile()
    same = jax.jit(lambda x: x * 1.0).lower(jnp.ones(3)).compile()
    for form, program in ((split, same), (op, same), (split, double), (xla, None)):
        key = ("attention", 64, 64, form)
        programs.started[key] = model.concurrent.futures.Future()
        if program is None:
            programs.started[key].set_exception(jax.errors.JaxRuntimeError("INTERNAL: no\nplan"))
        else:
            programs.started[key].set_result((program, 0.0))
        results.fill(
            row, form.name, model.measure_attention, programs, form, row, [jnp.ones(3)], outs
        )
        if len(programs.started) == 1:  # there was nothing to compare with
            assert row["missing"][split.name] == "left out"
    assert row["op_us"] > 0
    assert row["missing"] == {
        split.name: "wrong: differs by 1.0e-02", xla.name: "refused: INTERNAL: no plan",
    }  # fmt: skip


def test_results_of_a_model(tmp_path, bench):
    """A figure, no memory, no time; a file of the same commit is gone on from."""
    model = bench("model")
    plan, path = model.smoke_plan(), tmp_path / "results.json"
    head = {"device": "d", "commit": "c", "model": "m", "weights_bytes": 0}
    limit = model.WORKSPACE + model.cache_bytes(plan, 2, 64)
    results = model.Results(path, head, plan, limit)
    assert [row["missing"].get("cuda") for row in results.data["rows"]] == [
        "left out", "left out", "left out", "does not fit",
    ]  # fmt: skip

    def raising(error):
        raise error

    first, second, third, _ = results.data["rows"]
    results.fill(first, "cuda", lambda ms: {"cuda_ms": ms}, 2.0)
    full = model.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
    results.fill(second, "cuda", raising, full)
    results.fill(third, "cuda", raising, TimeoutError())
    with pytest.raises(model.jax.errors.JaxRuntimeError, match="INTERNAL"):
        results.fill(third, "without", raising, model.jax.errors.JaxRuntimeError("INTERNAL"))
    again = model.Results(path, head, plan, limit)
    assert again.data["rows"][0]["cuda_ms"] == 2.0
    assert [row["missing"].get("cuda") for row in again.data["rows"]] == [
        None, "out of memory", "left out", "does not fit",
    ]  # fmt: skip
    assert again.wanted("rows") == again.data["rows"][:3]
    fresh = model.Results(path, head | {"commit": "other"}, plan, limit)
    assert "cuda_ms" not in fresh.data["rows"][0]


def test_the_readme_quotes_the_results():
    """Each cell of the README's table is `us (share of the floor, ratio)` of a measured row."""
    results = json.loads((BENCHMARKS / "results/h200.json").read_text())
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert f"commit `{results['commit']}`" in readme
    rows = {
        (r["batch"], r["mean_len"], r["varlen"], r["h_q"], r["s_q"]): r for r in results["rows"]
    }
    columns = ((16, 1), (64, 1), (128, 1), (128, 2))
    lines = re.findall(r"^\| (\d+) x (\d+)( varlen)? \|(.*)\|$", readme, re.MULTILINE)
    assert len(lines) >= 5
    for batch, length, varlen, cells in lines:
        for column, cell in zip(columns, cells.split("|"), strict=True):
            row = rows[int(batch), int(length), bool(varlen), *column]
            share = f"{100 * row['of_floor']:.0f}%"
            assert cell.strip() == f"{row['us']:.1f} ({share}, {row['ratio']:.2f}x)"


def test_the_readme_quotes_the_means(report):
    """Of both cards; the least is that of any case."""
    text = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    quoted = re.search(
        r"geometric mean is (\S+), its least (\S+); on an H100, at commit `(\w+)`, (\S+) and (\S+)",
        text,
    ).groups()
    h200, h100 = (
        json.loads((BENCHMARKS / f"results/{name}.json").read_text()) for name in ("h200", "h100")
    )
    ratios = [[row["ratio"] for row in results["rows"]] for results in (h200, h100)]
    means = [f"{found(r):.2f}" for r in ratios for found in (report.geometric_mean, min)]
    assert quoted == (means[0], means[1], h100["commit"], means[2], means[3])


@pytest.mark.parametrize("card", ["h200", "h100"])
def test_the_pages_are_of_their_results(card, report, tmp_path):
    page = "performance.md" if card == "h200" else f"performance_{card}.md"
    report.main(["--results", str(BENCHMARKS / f"results/{card}.json"), "--docs", str(tmp_path)])
    assert (BENCHMARKS.parent / "docs" / page).read_text() == (tmp_path / page).read_text()


def test_the_readme_quotes_the_model():
    results = json.loads((BENCHMARKS / "results/h200_model.json").read_text())
    text = " ".join((BENCHMARKS.parent / "README.md").read_text().split())
    quoted = re.search(
        r"(\d+) sequences of (\d+) tokens, a step of the whole model takes (\S+) ms; with "
        r"attention in plain JAX it takes (\S+) ms",
        text,
    )
    batch, context = map(int, quoted.groups()[:2])
    (row,) = (r for r in results["rows"] if (r["batch"], r["context"]) == (batch, context))
    assert quoted.groups()[2:] == (f"{row['cuda_ms']:.1f}", f"{row['xla_ms']:.1f}")
    results = json.loads((BENCHMARKS / "results/h100_model.json").read_text())
    (row,) = (r for r in results["rows"] if (r["batch"], r["context"]) == (batch, context))
    assert f"on an H100 [{row['cuda_ms']:.1f} and {row['xla_ms']:.1f} ms]" in text


def test_the_docs_quote_the_results_on_two_gpus():
    results = json.loads((BENCHMARKS / "results/h200_x2.json").read_text())
    text = (BENCHMARKS.parent / "docs/parallelism.md").read_text()
    assert f"commit `{results['commit']}`" in text
    lines = re.findall(r"^\| (\w+) \| (\d+) x (\d+) \| (\d+) \|(.*)\|$", text, re.MULTILINE)
    assert len(lines) == len(results["rows"])
    for (kind, batch, length, s_q, cells), row in zip(lines, results["rows"], strict=True):
        assert (kind, int(batch), int(length), int(s_q)) == (
            row["kind"], row["batch"], row["length"], row["s_q"]
        )  # fmt: skip
        assert cells.split("|")[-1].strip() == f"{row['speedup']:.2f}x"
        times = [float(cell) for cell in cells.split("|")[:2]]
        np.testing.assert_allclose(times, [row["one_us"], row["two_us"]], atol=0.051)
