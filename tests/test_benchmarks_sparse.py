"""The benchmark of sparse decode: its cases, peer, goals and report; it runs on the CPU."""

import dataclasses
import gc
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_torch import FakeTorch
from lowering import SPARSE_DECODE, copies_in

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_dense_decode as dense
import bench_sparse_decode as sparse
import flash_attention
import report as pages
from bench_sparse_decode import HEADS_OP, OP, SparseDecode
from core import cards, launches, peers, plain, report
from core.results import read
from core.rounds import Inputs, Programs

SMOKE, EXTRA = OP.smoke


def make_inputs(case, calls=1):
    """(pool, lengths, [(lists, q) of each call])."""
    pool = OP.pool([case], lambda _: calls)
    found = Inputs(OP, case, Programs(OP, case, pool, calls).draw(), pool, calls)
    return pool, found.shared, found.owns


# -------------------- The cases


def test_the_cases_are_those_of_the_goals():
    names = [case.name for case in [*OP.cases, *HEADS_OP.cases]]
    assert len(set(names)) == len(names) == 64
    shapes = {(c.h_q, c.batch, c.topk) for c in OP.cases if c.d_k == 576}
    assert shapes == {
        (h, b, k) for h in (8, 16, 32, 64, 128) for b in (1, 8, 32, 128) for k in (512, 2048)
    }
    both = {(c.h_q, c.batch, c.topk, c.extra_topk) for c in OP.cases if c.d_k == 512}
    assert both == {(h, b, 128, k) for h in (64, 128) for b in (1, 32, 128) for k in (512, 1024)}
    assert {sparse.next_heads(case).h_q for case in HEADS_OP.cases if case.h_q < 64} == {64}
    assert {sparse.next_heads(case).h_q for case in HEADS_OP.cases if case.h_q > 64} == {128}
    assert {*OP.quick, *OP.baseline} <= set(OP.cases)


def test_floors_count_tokens_queries_and_results():
    case = SparseDecode(16, 128, 2048)
    assert round(case.floor_us(cards.H100), 1) == 99.5
    assert round(SparseDecode(128, 128, 2048).floor_us(cards.H200), 1) == 93.6
    both = SparseDecode(128, 128, 128, 1024, d_k=512)
    assert both.flops() == 2 * 128 * 128 * 1152 * 1024
    assert both.moved_bytes() == 128 * 1152 * 1024 + 2 * 128 * 128 * 1024


def test_what_a_round_names_is_too_large_for_the_l2():
    """That of the dense op beside it too."""
    for case in [*OP.cases, *HEADS_OP.cases]:
        assert case.calls * case.token_bytes() >= 256e6
        other = sparse.as_dense(case)
        assert other.calls * other.token_bytes() >= 256e6
        assert (other.token_bytes(), other.flops()) == (case.token_bytes(), case.flops())
        assert case.calls * case.loops * max(case.floor_us(), 6.0) >= 400


def test_lists_are_random_and_each_call_has_its_own():
    case = SparseDecode(16, 3, 200, 90, d_k=512)
    pool = np.empty((1000, 64, 1, 1))
    lengths, lists = OP.lists(case, pool, 4)
    assert {name: x.tolist() for name, x in lengths.items()} == {
        "main": [[200]] * 3, "extra": [[90]] * 3
    }  # fmt: skip
    drawn = np.concatenate([x[name].reshape(3, -1) for x in lists for name in ("main", "extra")], 1)
    assert drawn.shape == (3, 4 * 290)
    assert drawn.min() >= 0
    assert 63_000 < drawn.max() < 64_000
    assert len(np.unique(drawn)) > 0.95 * drawn.size  # as of 64,000
    assert not (np.sort(drawn) == drawn).all()


# -------------------- What results are compared with


@pytest.mark.parametrize("case", OP.smoke, ids=lambda case: case.name)
def test_wrong_results_are_seen(case):
    """A token less, another query, the extra list left out."""
    pool, lengths, (own, other) = make_inputs(case, 2)

    def errors(lengths=lengths, own=own):
        results = OP.call(case, "xla", pool, lengths, None, own)
        found = OP.check(case, pool, lengths0, right, [results])
        return {name: float(values[0]) for name, values in found.items()}

    lengths0, right = lengths, own
    assert OP.wrong(errors()) == ""
    short = {name: x - (name == min(lengths)) * 8 for name, x in lengths.items()}
    assert "rel_err" in OP.wrong(errors(short))
    assert "lse_err" in OP.wrong(errors(short))
    assert "rel_err" in OP.wrong(errors(own=(own[0], other[1])))
    assert "rel_err" in OP.wrong(errors(own=(other[0], own[1])))
    if case.extra_topk:
        assert "rel_err" in OP.wrong(errors(lengths | {"extra": jnp.zeros_like(lengths["extra"])}))


@pytest.mark.parametrize("case", OP.smoke, ids=lambda case: case.name)
def test_plain_jax_gives_the_same(case):
    """Shorter lists too."""
    pool, lengths, (own,) = make_inputs(case)
    lengths = {name: x - np.arange(len(x))[:, None] * 7 for name, x in lengths.items()}
    found = jax.jit(lambda *args: OP.plain(case, *args))(pool, lengths, own)
    ours = OP.call(case, "xla", pool, lengths, None, own)
    errors = OP.check(case, pool, lengths, own, [found, ours])
    assert max(errors["rel_err"]) < 4e-3
    assert max(errors["lse_err"]) < 1e-5
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]


@pytest.mark.parametrize("s_q", [1, 2])
def test_plain_jax_over_pages_gives_the_same(s_q):
    case = dense.DenseDecode(4, s_q, 3, 70, varlen=True)
    pool = dense.OP.pool([case], lambda _: 1)
    inputs = Inputs(dense.OP, case, Programs(dense.OP, case, pool, 1).draw(), pool, 1)
    found = dense.OP.plain(case, pool, inputs.shared, inputs.owns[0])
    errors = dense.OP.check(case, pool, inputs.shared, inputs.owns[0], [found])
    assert errors["rel_err"][0] < 4e-3
    assert errors["lse_err"][0] < 1e-5


def test_plain_jax_reads_16_bits_and_sums_in_float32():
    """Nothing of the size of the tokens is made in float32."""
    shapes = [(2, 1, 4, 576), (2, 300, 576)]
    q, kv = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    seen = jax.ShapeDtypeStruct((2, 1, 300), bool)
    jaxpr = jax.make_jaxpr(lambda *args: plain.attend(*args, 512, 0.1))(q, kv, seen)
    products = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(products) == 2
    for eqn in products:
        assert {var.aval.dtype for var in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
        assert eqn.outvars[0].aval.dtype == jnp.float32
    large = [v.aval for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.size >= 2 * 300 * 512]
    assert all(aval.dtype == jnp.bfloat16 for aval in large)


# -------------------- FlashAttention-3, with a fake PyTorch


def fake_metadata(
    batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, headdim, headdim_v, qkv_dtype,
    seqused_k, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k, page_size,
    max_seqlen_k_new, is_causal, window_size_left, window_size_right, has_softcap, num_splits,
    pack_gqa, sm_margin,
):  # fmt: skip
    """The operator's own names, in its order."""
    assert (max_seqlen_q, num_heads_k, headdim, headdim_v, page_size) == (1, 1, 64, 512, 1)
    assert (window_size_left, window_size_right, has_softcap, sm_margin) == (-1, -1, False, 0)
    assert seqused_k.tolist() == [max_seqlen_k] * batch_size
    assert cu_seqlens_q.tolist() == list(range(batch_size + 1))
    absent = cu_seqlens_k, cu_seqlens_k_new, seqused_q, leftpad_k, pack_gqa
    assert absent == (None,) * 5
    assert is_causal
    return np.array([num_splits, num_heads])


def fake_forward(
    q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q,
    seqused_k, max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos,
    rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, softmax_scale, is_causal,
    window_size_left, window_size_right, softcap, is_rotary_interleaved, scheduler_metadata,
    num_splits, pack_gqa, sm_margin, s_aux, cp_world_size, cp_rank, cp_tot_seqused_k,
):  # fmt: skip
    absent = (
        k_new, v_new, out, cu_seqlens_k, cu_seqlens_k_new, seqused_q, kv_batch_idx, leftpad_k,
        rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, pack_gqa, s_aux,
        cp_tot_seqused_k,
    )  # fmt: skip
    assert absent == (None,) * 17
    assert (max_seqlen_q, max_seqlen_k) == (1, page_table.shape[1])
    assert (window_size_left, window_size_right, softcap, sm_margin) == (-1, -1, 0.0, 0)
    assert (cp_world_size, cp_rank, is_causal, is_rotary_interleaved) == (1, 0, True, True)
    assert scheduler_metadata.tolist() == [num_splits, q.shape[1]]
    assert (q.shape[-1], k.shape[1:], v.shape[1:]) == (64, (1, 1, 64), (1, 1, 512))
    assert cu_seqlens_q.tolist() == list(range(len(page_table) + 1))
    assert seqused_k.tolist() == [page_table.shape[1]] * len(page_table)
    keys, values = k[page_table][:, :, 0, 0], v[page_table][:, :, 0, 0]
    scores = np.einsum("nhd,ntd->nht", q, keys) + np.einsum("nhd,ntd->nht", q_v, values)
    weights = np.exp(scores * softmax_scale)
    total = weights.sum(-1, keepdims=True)
    attended = np.einsum("nht,ntd->nhd", weights / total, values)
    return [attended, np.log(total[..., 0]).T, np.zeros(0), np.zeros(0)]


@pytest.fixture
def find_peer(monkeypatch, tmp_path):
    """() -> the peer, out of a fake wheel; its PyTorch."""
    operators = {"get_scheduler_metadata": fake_metadata, "fwd": fake_forward}
    torch = FakeTorch({"_vllm_fa3_C": operators})
    monkeypatch.setitem(sys.modules, "torch", torch)
    library = tmp_path / "vllm" / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so"
    library.parent.mkdir(parents=True)
    library.touch()
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    monkeypatch.setenv("FA3_SO", str(library))
    return lambda: OP.peers[0](types.SimpleNamespace(smoke=False, vllm=None)), torch


@pytest.mark.parametrize("s_q", [1, 2])
@pytest.mark.parametrize("case", OP.smoke, ids=lambda case: case.name)
def test_flash_attention_attends_to_the_lists(case, s_q, find_peer, monkeypatch):
    """Every call its own, its metadata made beforehand; the fastest number of splits counts."""
    case, (find, torch) = dataclasses.replace(case, s_q=s_q), find_peer
    monkeypatch.setattr(flash_attention, "NUM_SPLITS", (0, 1, 2, 8))  # 8: too many for the lists
    timings = {
        f"num_splits {n}": types.SimpleNamespace(us=us) for n, us in ((0, 9), (1, 7), (2, 8))
    }
    monkeypatch.setattr(
        peers, "time_rounds", lambda rounds, **_: {name: timings[name] for name in rounds}
    )
    pool, lengths, owns = make_inputs(case, 2)
    pool = pool.astype(jnp.float32)  # NumPy hands over no bfloat16
    owns = [(lists, q.astype(jnp.float32)) for lists, q in owns]
    peer = find()
    assert peer.name == "FlashAttention-3 (vllm 0.33.0)"
    assert peer.ways(case) == [""]
    round_, results = peer.prepare(case, "", pool, lengths, owns)
    assert (round_.label, round_.calls) == ("num_splits 1", 2)
    splits = 2 if case.tokens < 128 else 3
    assert [len(graph.calls) for graph in torch.graphs] == [2] * splits
    for own, result in zip(owns, results, strict=True):
        errors = OP.check(case, pool, lengths, own, [result])
        assert errors["rel_err"][0] < 1e-5
        assert errors["lse_err"][0] < 1e-5


def test_there_is_no_peer_without_its_library(monkeypatch):
    monkeypatch.setenv("FA3_SO", "nowhere.so")
    with pytest.raises(FileNotFoundError, match=r"_vllm_fa3_C.abi3.so is not at nowhere.so"):
        OP.peers[0](types.SimpleNamespace(smoke=False, vllm=None))
    assert OP.peers[0](types.SimpleNamespace(smoke=True)) is None


# -------------------- It runs, and is reported


def test_sparse_decode_runs(tmp_path, capsys):
    path = tmp_path / "cpu_sparse.json"
    options = ["--smoke", "--repeats", "1", "--out", str(path), "--commit", "abc"]

    def run():
        return sparse.bench.main(OP, "Sparse", options, sections=sparse.SECTIONS, suffix="_sparse")

    before = jax.live_arrays()
    gc.disable()
    try:
        assert run() == 0
        left = [array for array in jax.live_arrays() if not any(array is old for old in before)]
    finally:
        gc.enable()
    assert not left  # the next pool needs the memory at once
    assert "other heads, time over that of the next of 64 and 128: " in capsys.readouterr().out
    data = read(path)
    assert data["errors"] == []
    table, heads = (report.of(data["rows"], "sparse_decode", name) for name in ("table", "heads"))
    assert [row["case"] for row in table] == [case.name for case in OP.smoke]
    for row in table:
        assert row.keys() >= {
            "op", "dtype", "d_k", "h_q", "s_q", "batch", "topk", "extra_topk", "us", "floor_us",
            "peer", "peer_us", "ratio", "rel_err", "lse_err", "us_with_schedule", "dense_us",
            "fixed_us", "jax_us", "plain_us",
        }  # fmt: skip
        assert row["rel_err"] < 5e-3
        assert row["lse_err"] < 1e-4
    (row,) = heads
    assert row["h_q"] == 3
    assert {"next_us", "dense_us", "plain_us"} & row.keys() == {"next_us"}
    assert run() == 0
    assert "0 cases to measure" in capsys.readouterr().out
    assert read(path)["rows"] == data["rows"]


def made_up(case, section="table", **columns):
    """A row of a card: 10 us, the peer 15, the dense kernel 9."""
    row = {"op": OP.name, "section": section, "case": case.name, "commit": "abc", "jax": "1"}
    row |= case.row() | {
        "us": 10.0, "us_with_schedule": 11.5, "floor_us": 8.0, "of_floor": 0.8, "rel_err": 2e-3,
        "lse_err": 1e-6, "peer": f"FlashAttention-3 (vllm 0.33.0), num_splits {case.batch}",
        "peer_us": 15.0, "ratio": 1.5, "dense_us": 9.5,
    }  # fmt: skip
    return row | columns


def made_up_rows():
    rows = [made_up(case) for case in OP.cases]
    rows[0] |= {"ratio": 1.25, "peer_us": 12.5}  # h 8, batch 1, top-k 2048
    rows[2] |= {"dense_us": 8.0}  # h 8, batch 32
    rows[18] |= {"us_with_schedule": 14.0, "fixed_us": 12.0, "plain_us": 900.0, "jax_us": 950.0}
    return [*rows, *(made_up(case, "heads", next_us=10.5) for case in HEADS_OP.cases)]


def test_goals_are_told():
    found = dict(line.split(": ", 1) for line in sparse.goals(made_up_rows()))
    means = [(1.5 ** (n - 1) * 1.25) ** (1 / n) for n in (20, 10)]
    assert list(found.values()) == [
        f"geometric mean of all and of batch 1 and 8 {means[0]:.3f} and {means[1]:.3f}, least "
        "(1.25, 'h8-d576-1x2048')",
        "h_q 128 1.053 (h128-d576-32x512), others 1.250 (h8-d576-32x2048)",
        "0.952 (h96-d576-32x2048)",
        "4.000 (h128-d576-32x2048)",
        "1.200 (h128-d576-32x2048)",
    ]
    assert "not measured" in sparse.goals([])[0]


def test_sparse_decode_is_reported(tmp_path):
    folder, docs = tmp_path / "results", tmp_path / "docs"
    folder.mkdir()
    for name in ("h100.json", "h100_model.json"):
        (folder / name).write_text((cards.FOLDER / name).read_text())
    head = {"device": cards.H100.kind, "errors": [], "rows": made_up_rows()}
    (folder / "h100_sparse.json").write_text(json.dumps(head))
    readme = tmp_path / "README.md"
    readme.write_text(f"Before.\n\n{pages.README_BEGIN}old\n{pages.README_END}\nAfter.\n")
    arguments = ["--card", "h100", "--results", str(folder), "--docs", str(docs)]
    assert pages.main(arguments) == 0
    text = (docs / "performance_h100.md").read_text()
    part = text.split("\n## Sparse decode\n")[1].split("\n## ")[0]
    flat = " ".join(part.split())
    assert "The peer is FlashAttention-3 (vllm 0.33.0), with pages of one token" in flat
    assert "### d_k 512, h_q 128, bf16" in part
    assert "| 1 x 2048 | 10.0 | 80% | 8.0 | 11.5 | 9.5 | 12.5 | 1.25 | 2.0e-03 |" in part
    assert "| 32 x 128 + 1024 | 10.0 | 80% |" in part
    assert "| 32 x 2048, d_k 576, h_q 128, bf16 | 10.0 | 900 | 90.0 | 950 |" in part
    assert "| 20 | 1 x 2048 | 10.0 | 10.5 | 15.0 | 1.50 | 2.0e-03 |" in part
    assert "![time of FlashAttention-3 over ours, by case](sparse_speed_h100.svg)" in part
    plot = (docs / "sparse_speed_h100.svg").read_text()
    assert "batch \u00d7 tokens" in plot
    assert plot.count("<circle") == len(OP.cases) + 5
    before, _, block = readme.read_text().partition(pages.README_BEGIN)
    block, _, after = block.partition(pages.README_END)
    assert (before, after) == ("Before.\n\n", "\nAfter.\n")
    words, table = block.split("\n\n")
    assert " ".join(words.split()) == (
        "Sparse decode on one H100 at commit `abc`: microseconds a call (floor / time, "
        "FlashAttention-3's time / ours). d_k is 576; with an extra list, "
        '"128 + 1024", it is 512. '
        "Over 52 cases the ratio's geometric mean is 1.49, its least 1.25."
    )
    head, _, first, *others = table.strip().split("\n")
    assert head == "| batch x tokens | h_q 8 | h_q 16 | h_q 64 | h_q 128 |"
    assert first == f"| 1 x 2048 | 10.0 (80%, 1.25x) |{3 * ' 10.0 (80%, 1.50x) |'}"
    cell = " 10.0 (80%, 1.50x) |"
    assert others == [
        *(f"| {b} x 2048 |{4 * cell}" for b in (8, 32, 128)),
        *(f"| {b} x 128 + 1024 |  |  |{2 * cell}" for b in (1, 32, 128)),
    ]


def test_a_slow_case_misses_the_gate(tmp_path, capsys):
    rows = made_up_rows()
    (tmp_path / "h100.json").write_text((cards.FOLDER / "h100.json").read_text())
    for ratio, status in ((1.2, 0), (0.99, 1)):
        rows[5]["ratio"] = ratio
        head = {"device": cards.H100.kind, "errors": [], "rows": rows}
        (tmp_path / "h100_sparse.json").write_text(json.dumps(head))
        arguments = ["--card", "h100", "--results", str(tmp_path), "--gate"]
        assert pages.main(arguments) == status
        out = capsys.readouterr().out
        assert ("h16-d576-8x2048: ratio 0.990 < 1.0" in out) == bool(status)
        assert "sparse_decode: Over 52 cases" in out


# -------------------- Its programs


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("kind", ["given", "made"])
@pytest.mark.parametrize(
    "case", [SparseDecode(16, 1, 512), SparseDecode(64, 2, 128, 512, d_k=512)], ids=lambda c: c.name
)
def test_a_round_of_lists_is_one_graph(case, kind, h200):
    """All calls are in it, and nothing is copied; hundreds of them compile too."""
    calls, loops = (case.calls if kind == "given" and case.batch == 1 else 5), 7
    pool = jax.ShapeDtypeStruct((5000, 64, 1, case.d_k), jnp.bfloat16)
    programs = Programs(OP, case, pool, calls, loops, sharding=h200)
    compiled, counts = launches.compile_and_count(programs.lower_round("cuda", kind), loops, {})
    text = compiled.as_text()
    assert re.findall(r'"(jax_flashmla_\w+)"', text) == [SPARSE_DECODE] * calls
    assert not copies_in(text)
    assert counts[0] == loops
    assert counts[1] <= 1  # the loop's counter, before it
