"""The benchmark's own rules: floors, inputs, the gate; and that it runs, on the CPU."""

import copy
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

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
def report(workloads):
    import report

    return report


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
    return {"device": "GPU", "commit": "0", "ceilings": {}, "rows": rows}


def test_cases_agree_with_the_stored_measurements(workloads):
    assert len(workloads.all_cases()) == 113
    for case, stored in workloads.stored_peers().items():
        assert sum(case.lengths()) == stored["sum_len"]
        assert case.floor_us() == pytest.approx(stored["floor_us"], abs=0.006)
        assert case.causal == stored["causal"]


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


def test_the_benchmark_runs_and_is_reported(tmp_path):
    results, docs = tmp_path / "cpu.json", tmp_path / "docs"
    decode = [sys.executable, BENCHMARKS / "decode.py", "--smoke", "--out", results]
    subprocess.run(decode, check=True, capture_output=True, timeout=300)
    data = json.loads(results.read_text())
    assert {"device", "commit", "ceilings", "rows"} == data.keys()
    for row in data["rows"]:
        assert row.keys() >= COLUMNS
        assert row["rel_err"] < 5e-3
    command = [sys.executable, BENCHMARKS / "report.py", "--results", results, "--docs", docs]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert "2 x 100" in (docs / "performance.md").read_text()
    assert (docs / "performance.svg").stat().st_size > 1000


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
