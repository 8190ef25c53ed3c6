"""The core of the benchmarks runs an op that it does not know, and keeps its own rules."""

import dataclasses
import json
import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

from core import bench, cards, check, inputs, peers, power, profiling, report, rounds, timing
from core.op import Case, Op
from core.results import Results

BENCHMARKS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"

# -------------------- A made-up op: the mean of some rows of a pool, times a shared scale


@dataclasses.dataclass(frozen=True)
class Rows(Case):
    """`count` rows of `width` columns."""

    count: int
    width: int = 8
    dtype: str = "f32"

    @property
    def name(self):
        return f"{self.count}x{self.width}" + ("" if self.dtype == "f32" else f"-{self.dtype}")

    def flops(self):
        return self.count * self.width

    def token_bytes(self):
        return 4 * self.count * self.width

    def moved_bytes(self):
        return self.token_bytes() + 4 * self.width


def toy_lists(case, pool, calls):
    picked = np.random.default_rng(0).permutation(len(pool))[: calls * case.count]
    return np.float32(3), list(picked.reshape(calls, case.count))


def toy_call(case, implementation, pool, scale, doubled, own):
    picked, noise = own
    doubled = 2 * scale if doubled is None else doubled  # what is prepared
    return (doubled / 2 * pool[picked].mean(0) + noise, jnp.asarray(case.count, jnp.int32))


def toy_check(case, pool, scale, own, found):
    expected = scale * pool[own[0]].astype(jnp.float32).mean(0) + own[1], jnp.int32(case.count)
    return check.compare(
        expected, found, rel_err=check.relative, count_err=check.largest_difference
    )


def toy_peer(options):
    """A peer with four ways: two work, the third fails, the results of the fourth are wrong."""

    def call(way, pool, scale, own):
        if way == "broken":
            raise NotImplementedError("not for these rows")
        if way == "wrong":
            return own[1], jnp.int32(len(own[0]))
        turns = 20_000 if way == "slow" else 1
        mean = jax.lax.fori_loop(0, turns, lambda _, x: x * 1.0 + pool[own[0]].mean(0) - x, own[1])
        return scale * mean + own[1], jnp.int32(len(own[0]))

    return peers.JaxPeer("Toy library", call, ["slow", "fast", "broken", "wrong"])


def toy_other(options):
    """Not a peer: another call, which is faster and computes something else."""
    return peers.JaxPeer(
        "Another op", lambda way, pool, scale, own: (own[1], jnp.int32(0)), column="other_us"
    )


def toy_plain(case, pool, scale, own):
    return toy_call(case, "plain", pool, scale, None, own)


# Another op of the same pool, which has no fewer than 6 rows.
BESIDE = Op(
    "toy of more rows", cases=[], smoke=[], pool=None, lists=toy_lists, check=toy_check,
    draw=lambda case, key: jax.random.normal(key, (case.width,)), call=toy_call,
    limits={"rel_err": 1e-5, "count_err": 0.0},
)  # fmt: skip


def with_more_rows(case):
    return dataclasses.replace(case, count=case.count + 2) if case.width == 8 else None


TOY = Op(
    "toy",
    cases=[Rows(4), Rows(6), Rows(4, 16)],
    smoke=[Rows(4), Rows(6), Rows(4, 16)],
    pool=lambda cases, calls: jax.random.normal(jax.random.key(0), (64, cases[0].width)) + 1,
    lists=toy_lists,
    draw=lambda case, key: jax.random.normal(key, (case.width,)),
    prepare=lambda case, implementation, scale: 2 * scale,
    call=toy_call,
    check=toy_check,
    peers=[toy_peer, toy_other],
    limits={"rel_err": 1e-5, "count_err": 0.0},
    pool_key=lambda case: case.width,
    baseline=[Rows(4)],
    plain=toy_plain,
    beside={"more_us": (BESIDE, with_more_rows)},
    is_sustained=lambda case: case.count == 6,
    heading=lambda row: f"rows of {row['width']}",
)


def run(op, path, *arguments):
    return bench.main(op, "A toy.", ["--smoke", "--out", str(path), *arguments])


@pytest.fixture(scope="module")
def toy_results(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "toy.json"
    assert run(TOY, path, "--commit", "abc") == 0
    return path


def test_an_op_that_is_new_is_timed_and_checked(toy_results):
    data = json.loads(toy_results.read_text())
    rows = data["rows"]
    assert [row["case"] for row in rows] == ["4x8", "6x8", "4x16"]
    for row, case in zip(rows, TOY.cases, strict=True):
        stamp = {"op": "toy", "section": "table", "commit": "abc", "jax": jax.__version__}
        assert row.items() >= (stamp | case.row()).items()
        assert row["floor_us"] == round(case.floor_us(), 2)
        assert row["rel_err"] < 1e-5
        assert row["count_err"] == row["peer_rel_err"] * 0
        assert {"us", "us_with_schedule", "spread", "host_us", "jax_us", "plain_us",
                "sustained_us"} <= set(row)  # fmt: skip
        assert ("more_us" in row) == (row["width"] == 8)
    assert data["errors"] == []


def test_the_fastest_way_of_a_peer_counts(toy_results):
    """The row names the way; one that fails is left out, and one whose results are wrong."""
    for row in json.loads(toy_results.read_text())["rows"]:
        assert row["peer"] == "Toy library, fast"
        assert row["peer_us"] == row["peer_fast_us"] < row["peer_slow_us"]
        assert not {"peer_broken_us", "peer_wrong_us"} & row.keys()
        assert 0 < row["other_us"] < row["peer_slow_us"]
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["us"], rel=2e-3, abs=2e-2)


@pytest.mark.parametrize("wrong", [False, True])
def test_another_op_beside_is_checked(wrong, tmp_path, capsys):
    """With its own inputs and limits. A wrong one has no column, and the row stays."""

    def call(case, *args):
        out, count = toy_call(case, *args)
        return out.at[0].add(wrong), count

    beside = {"more_us": (dataclasses.replace(BESIDE, call=call), with_more_rows)}
    op = dataclasses.replace(TOY, beside=beside, peers=[])
    path = tmp_path / "toy.json"
    assert run(op, path, "--cases", "4x8") == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert ("more_us" in row) != wrong
    assert row["rel_err"] < 1e-5
    assert ("more_us, 4x8: ValueError: wrong results: rel_err" in capsys.readouterr().out) == wrong


def test_a_round_that_was_chosen_tells_its_label(tmp_path):
    class Chosen(peers.JaxPeer):
        def prepare(self, *args):
            round_, results = super().prepare(*args)
            slow = dataclasses.replace(round_, enqueue=lambda: (time.sleep(0.01), round_.enqueue()))
            makers = {"none": lambda: 1 / 0, "slow": lambda: (slow, None)}
            return peers.fastest_round(makers | {"fast": lambda: (round_, results)})

    def call(way, pool, scale, own):
        return scale * pool[own[0]].mean(0) + own[1], jnp.int32(len(own[0]))

    op = dataclasses.replace(TOY, peers=[lambda options: Chosen("Toy library", call)])
    path = tmp_path / "toy.json"
    assert run(op, path, "--cases", "6x8") == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["peer"] == "Toy library, fast"
    with pytest.raises(RuntimeError, match="none of a, b works"):
        peers.fastest_round(dict.fromkeys("ab", lambda: 1 / 0))


def test_a_run_goes_on_where_it_was_stopped(toy_results, tmp_path, capsys):
    path = tmp_path / "toy.json"
    path.write_text(toy_results.read_text())
    assert run(TOY, path, "--commit", "abc") == 0
    assert "0 cases to measure" in capsys.readouterr().out
    assert run(TOY, path, "--commit", "abc", "--budget", "0") == 1  # nothing is measured
    assert "out of time" in capsys.readouterr().out
    data = json.loads(path.read_text())
    data["rows"].pop(1)
    path.write_text(json.dumps(data))
    assert run(TOY, path, "--commit", "abc", "--no-peer") == 0
    assert "1 cases to measure" in capsys.readouterr().out
    assert {row["case"]: row["peer"] is None for row in json.loads(path.read_text())["rows"]} == {
        "4x8": False, "4x16": False, "6x8": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "column"),
    [
        (lambda out, count: (out.at[1].multiply(1.001), count), "rel_err"),
        (lambda out, count: (out.at[0].set(jnp.nan), count), "rel_err"),
        (lambda out, count: (out, count + 1), "count_err"),
    ],
)
def test_a_wrong_result_fails_the_run(wrong, column, tmp_path, capsys):
    op = dataclasses.replace(TOY, call=lambda *args: wrong(*toy_call(*args)), peers=[])
    path = tmp_path / "toy.json"
    assert run(op, path, "--cases", "6x8") == 1
    assert "WRONG" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert not row[column] <= op.limits[column]
    assert any(f"6x8: {column}" in line for line in report.gate_failures(op, results_of([row])))


def test_a_case_that_raises_fails_the_run_and_the_others_go_on(tmp_path, capsys):
    def lists(case, pool, calls):
        if case.count == 6 and calls > 1:  # not while its programs are lowered
            raise ValueError("no such rows")
        return toy_lists(case, pool, calls)

    path = tmp_path / "toy.json"
    op = dataclasses.replace(TOY, lists=lists, peers=[])
    assert run(op, path) == 1
    assert "6x8: FAILED ValueError: no such rows" in capsys.readouterr().out
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["4x8", "4x16"]


def test_cases_are_chosen_and_changed():
    def names(*arguments):
        options = bench.parse_arguments("A toy.", ["--smoke", *arguments], ["table"])
        return [case.name for case in bench.select_cases(TOY, options)]

    assert names("--cases", "4x,6x") == ["4x8", "6x8", "4x16"]
    assert names("--cases", "x8$", "--set", "dtype=f64,width=32") == ["4x32-f64", "6x32-f64"]
    with pytest.raises(SystemExit):
        names("--sections", "table,layers")


def test_an_op_that_is_new_is_reported(toy_results):
    page = report.Page("CPU", "A page.", "abc")
    rows = json.loads(toy_results.read_text())["rows"]
    report.op_tables(page, TOY, rows)
    text = str(page)
    assert text.startswith("# Performance on one CPU\n\nA page.\n\n### rows of 8\n")
    us, peer = f"{rows[0]['us']:.1f}", f"{rows[0]['peer_us']:.1f}"
    assert f"| 4x8 | {us} | " in text
    assert f"| {peer} | {rows[0]['peer_slow_us']:.1f} | {peer} |" in text
    assert f"| {rows[0]['more_us']:.1f} | {peer} | {rows[0]['peer_slow_us']:.1f} |" in text
    for title in ("rows of 16", "Under sustained load", "Beside plain JAX"):
        assert f"\n### {title}\n" in text
    assert "Measured at commit" not in text
    page = report.Page("CPU", "A page.", "another")
    report.op_tables(page, TOY, rows)
    assert "Measured at commit `abc`." in " ".join(str(page).split())


# -------------------- The gate


def results_of(rows, **head):
    stamp = {"op": "toy", "section": "table", "commit": "0", "jax": "1"}
    return {"errors": [], "rows": [stamp | row for row in rows]} | head


def passing_rows():
    return [
        {"case": case.name, "us": 9.0, "peer_us": 9.0, "ratio": 1.0, "floor_us": 8.0,
         "rel_err": 1e-6, "count_err": 0.0}
        for case in TOY.cases
    ]  # fmt: skip


def test_the_gate_passes_cases_as_fast_as_the_peer():
    assert report.gate_failures(TOY, results_of(passing_rows())) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.999}, "6x8: ratio 0.999 < 1.0"),
        ({"ratio": float("nan")}, "6x8: ratio nan < 1.0"),
        ({"rel_err": float("nan")}, "table 6x8: rel_err nan"),
        ({"count_err": 1.0}, "table 6x8: count_err 1.0"),
        ({"ratio": None, "peer_us": None}, "6x8: no peer"),
        ({"commit": "1"}, "the cases are of several commits: 0, 1"),
        ({"case": "another"}, "6x8: missing"),
    ],
)
def test_the_gate_stops_other_cases(change, message):
    rows = passing_rows()
    rows[1] |= change
    (failure,) = report.gate_failures(TOY, results_of(rows))
    assert failure.startswith(message)


def test_the_gate_stops_errors_and_wrong_rows_of_other_sections():
    row = passing_rows()[0] | {"section": "growth", "rel_err": 1.0, "ratio": 0.5}
    results = results_of([*passing_rows(), row], errors=["out of time"])
    assert report.gate_failures(TOY, results) == ["error: out of time", "growth 4x8: rel_err 1.0"]


# -------------------- Floors, rounds, inputs


def test_a_card_has_its_floors_and_its_file():
    h200, h100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
    names = [cards.results_path(kind).name for kind in (h200, h100, "NVIDIA GH200 480GB", "cpu")]
    assert names == ["h200.json", "h100.json", "nvidia_gh200_480gb.json", "cpu.json"]
    assert cards.results_path(h100, "_model").name == "h100_model.json"
    assert cards.card_of(f"{h100}, 132 SMs") is cards.H100
    assert cards.card_of(f"{h200}, 132 SMs") is cards.H200
    reads = Rows(10**6)
    assert reads.floor_us(cards.H200) == pytest.approx(32 * (1e6 + 1) / 4.55e6)
    assert reads.floor_us(cards.H100) == pytest.approx(32 * (1e6 + 1) / 3.08e6)
    assert reads.floor_us(cards.card_of("another")) == reads.floor_us(cards.H200)


def test_small_calls_need_many():
    """So that those of a round name what the L2 cannot hold, as far as the case allows it."""
    assert Rows(10**4).calls == 64

    class Many(Rows):
        max_calls = 2000

    assert Many(10**4).calls == np.ceil(300e6 / (4 * 8 * 10**4))
    assert "max_calls" not in Many(10**4).row()


def test_a_loop_waits_for_the_last_turn():
    """So that XLA cannot move calls out of it; the results are those of one turn."""
    case, pool = TOY.cases[0], TOY.pool(TOY.cases, None)
    results = []
    for loops in (1, 3):
        programs = rounds.Programs(TOY, case, pool, 2, loops)
        each = rounds.Inputs(TOY, case, programs.draw(), pool, 2)
        program = programs.round("xla", "made")
        op_round = rounds.OpRound(program, each, None, 2, loops)
        assert op_round.round.calls == 2 * loops
        before = jax.tree.leaves(op_round.results)
        assert np.isnan(before[0]).all()  # poisoned
        assert before[1] == np.iinfo(np.int32).max
        op_round.round.enqueue()
        op_round.round.wait()
        assert all(x.is_deleted() for x in before)  # donated
        results.append(op_round.results)
        assert ("while(" in program.as_text()) == (loops > 1)
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert not any(np.isnan(out).any() for out, _ in results[0])


def test_page_tables_share_no_page_while_the_pool_lasts():
    lengths, counts = [200, 64, 1], [4, 1, 1]
    tables = inputs.page_tables(lengths, 64, 5, 24, 4)
    assert tables.shape == (4, 3, 5)
    used = [table[i, :count] for table in tables for i, count in enumerate(counts)]
    assert sorted(np.concatenate(used)) == list(range(24))
    assert not any(table[i, count:].any() for table in tables for i, count in enumerate(counts))


def test_a_pool_too_small_for_a_call_raises():
    with pytest.raises(ValueError, match="a call needs 30 pages, the pool has 7"):
        inputs.page_tables([640] * 3, 64, 10, 7, 1)


def test_attention_to_rows_is_that_to_their_tokens():
    rng = np.random.default_rng(0)
    q, rows = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 2, 8), (40, 8)))
    slots, seen = rng.integers(40, size=(6, 10)), rng.random((6, 10)) < 0.7
    out, lse = check.attend_rows(q, rows, jnp.asarray(slots), jnp.asarray(seen), 5, 0.3)
    for i in range(6):
        scores = 0.3 * np.asarray(q[i], np.float64) @ np.asarray(rows)[slots[i][seen[i]]].T
        total = np.exp(scores).sum(-1, keepdims=True)
        expected = np.exp(scores) / total @ np.asarray(rows)[slots[i][seen[i]], :5]
        np.testing.assert_allclose(out[i], expected, atol=1e-5)
        np.testing.assert_allclose(lse[i], np.log(total[:, 0]), atol=1e-5)


@pytest.mark.parametrize("s", [1, 3])
def test_attention_in_float32_is_a_softmax(s):
    rng = np.random.default_rng(0)
    q, kv = rng.normal(size=(s, 2, 8)), rng.normal(size=(12, 8))
    seen = rng.random((s, 12)) < 0.6
    seen[0] = False  # sees no token

    def tokens(i):
        cut = [jax.lax.dynamic_slice_in_dim(x, 4 * i, 4, axis) for x, axis in ((kv, 0), (seen, 1))]
        return tuple(map(jnp.asarray, cut))

    out, lse = check.attend(jnp.asarray(q, jnp.float32), tokens, 3, 6, 0.5)
    scores = np.where(seen[:, None], 0.5 * np.einsum("shd,td->sht", q, kv), -np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected = np.log(np.exp(scores).sum(-1)).T
    np.testing.assert_allclose(out[1:], (weights @ kv[:, :6])[1:], atol=1e-5)
    np.testing.assert_allclose(lse[:, 1:], expected[:, 1:], atol=1e-5)
    assert not out[0].any()
    assert np.isposinf(lse[:, 0]).all()


def test_measures_of_errors():
    """Equal infinities do not differ; NaN anywhere does."""
    x = jnp.array([3.0, 4.0])
    assert float(check.relative(x * 1.1, x)) == pytest.approx(0.1)
    assert np.isnan(check.relative(x.at[0].set(jnp.nan), x))
    y = jnp.array([jnp.inf, 1.0])
    assert check.largest_difference(y, y) == 0
    assert check.largest_difference(y + 0.5, y) == 0.5
    assert np.isnan(check.largest_difference(y.at[1].set(jnp.nan), y))


# -------------------- The results file


def test_rows_stay_until_they_are_measured_again(tmp_path):
    path = tmp_path / "results.json"
    first = Results(path, "GPU", "1", "0.11")
    first.add("op", "table", "a", {"us": 1.0})
    first.add("op", "growth", "a", {"us": 2.0})
    second = Results(path, "GPU", "2", "0.11")
    assert not second.has("op", "table", "a")
    second.add("op", "growth", "a", {"us": 3.0})
    second.add("another", "table", "a", {"us": 4.0})
    assert second.has("op", "growth", "a")
    assert not Results(path, "GPU", "2", "0.12").has("op", "growth", "a")
    rows = json.loads(path.read_text())["rows"]
    assert [(r["op"], r["section"], r["us"], r["commit"]) for r in rows] == [
        ("op", "table", 1.0, "1"), ("op", "growth", 3.0, "2"), ("another", "table", 4.0, "2"),
    ]  # fmt: skip
    assert path.read_text().count("\n") == 5 + len(rows) + 2  # a line each
    other = Results(path, "another GPU", "2", "0.11")
    other.save()
    assert json.loads(path.read_text())["rows"] == []


@pytest.mark.parametrize("commit", ["1-dirty", "unknown"])
def test_a_changed_tree_is_measured_again(commit, tmp_path):
    results = Results(tmp_path / "results.json", "GPU", commit, "0.11")
    results.add("op", "table", "a", {"us": 1.0})
    assert not results.has("op", "table", "a")


# -------------------- Peers


def test_a_library_is_found_and_its_version(tmp_path, monkeypatch):
    library = tmp_path / "vllm" / "_flashmla_C.abi3.so"
    monkeypatch.setenv("SOME_SO", str(library))
    with pytest.raises(FileNotFoundError, match=r"_flashmla_C.abi3.so is not at"):
        peers.find_library(library.name, "SOME_SO")
    library.parent.mkdir()
    library.touch()
    assert peers.find_library(library.name, "SOME_SO") == library
    assert peers.version_of(library) == "vllm of unknown version"
    assert peers.version_of(library, "0.26.0") == "vllm 0.26.0"
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    assert peers.version_of(library) == "vllm 0.33.0"
    assert peers.version_of(library.parent / "part" / "_part_C.abi3.so") == "vllm 0.33.0"
    monkeypatch.delenv("SOME_SO")
    with pytest.raises(FileNotFoundError, match="set SOME_SO or install vllm"):
        peers.find_library(library.name, "SOME_SO")


# -------------------- Profiles, sustained load


def test_overlap_of_calls_is_found():
    apart = [("decode", 0.0, 5.0), ("combine", 4.0, 6.0), ("decode", 7.0, 12.0)]
    apart.append(("combine", 11.0, 13.0))
    assert profiling.summarize(apart, 2)[1] == 0
    assert profiling.summarize([("decode", 0.0, 5.0), ("decode", 4.5, 9.0)], 2)[1] == 0.5
    assert profiling.summarize(apart, 3)[1] is None


def test_a_profile_fails_where_calls_overlap(monkeypatch, capsys):
    for end, found, status in ((4.0, 0.0, 0), (4.8, 0.3, 0), (5.5, 1.0, 1)):
        kernels = [("toy", 0.0, end), ("toy", 4.5, 9.0)]
        monkeypatch.setattr(profiling, "record", lambda _, kernels=kernels: kernels)
        assert bench.main(TOY, "A toy.", ["--smoke", "--profile", "--no-peer"]) == status
        shown = f"largest overlap of two of our calls, 3 cases: {found:.2f} us"
        assert shown in capsys.readouterr().out


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
def test_sustained_load_is_timed_and_read(nvml, monkeypatch):
    """With a clock that a busy machine does not delay. The readings take real time."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
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


def test_the_later_readings_count():
    sampler = power.Sampler(None)
    assert sampler.medians() == (None, None)
    sampler.samples = [(1980, 300.0)] * 5 + [(1500, 700.0)] * 4
    assert sampler.medians() == (1500, 700)


def test_the_probed_clock_counts_where_there_is_one():
    meter = power.Meter(found=False)
    meter.nvml, meter.probe = FakeNvml(), FakeNvml()
    meter.probe.mhz = lambda: 1612.3
    round_ = timing.Round(4, lambda: None, lambda: time.sleep(0.01))
    assert power.sustain(round_, 1000, 0.01, meter).mhz == 1612
    meter.probe = FakeNvml(fails=True)
    assert power.sustain(round_, 1000, 0.01, meter).mhz in (1980, 1500)


def test_what_starting_a_burst_costs_does_not_count(monkeypatch):
    """Rounds take turns, with rests between them; a slow host is seen."""
    clock, order = types.SimpleNamespace(now=0.0), []

    def sleep(seconds):
        order.append("rest")
        clock.now += 10 * seconds

    fake = types.SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep)
    monkeypatch.setattr(timing, "time", fake)

    def make(name, device, host):
        pending = []

        def enqueue():
            clock.now += host
            pending.append(max(device - host, 0))
            order.append(name)

        def wait():
            clock.now += sum(pending) + 0.003  # awaiting a burst
            pending.clear()

        return timing.Round(10, enqueue, wait)

    each = {"ours": make("ours", 1e-3, 1e-4), "late": make("late", 1e-3, 1e-3)}
    found = timing.time_rounds(each, repeats=3, seconds=0.02, rest=0.05, sm_clock=lambda: 1755)
    assert [timing_.us for timing_ in found.values()] == pytest.approx([100, 100])
    assert [timing_.host_bound for timing_ in found.values()] == [False, True]
    assert all(timing_.sm_mhz == 1755 for timing_ in found.values())
    order = order[order.index("rest") :]
    turns = [name for i, name in enumerate(order) if name != "rest" and order[i - 1] == "rest"]
    assert turns == ["ours", "ours", "late", "late"] * 3  # a short burst, a long one
