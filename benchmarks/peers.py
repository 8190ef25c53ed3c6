"""Peers that are timed beside the op, on the same inputs."""

import os
import pathlib
import typing

from timing import Round
from workloads import HEAD_DIM_K, HEAD_DIM_V

FLASHMLA_NAME = "FlashMLA (vllm 0.26.0)"


class Outputs(typing.NamedTuple):
    """What a peer's round writes, as JAX arrays: one for each call."""

    outs: list
    lses: list


def find_flashmla(option=None):
    """The path of FlashMLA's shared object: an option, $FLASHMLA_SO or an installed vllm."""
    path = option or os.environ.get("FLASHMLA_SO")
    if path is None:
        import importlib.util

        vllm = importlib.util.find_spec("vllm")
        if vllm is None or not vllm.submodule_search_locations:
            return None
        path = pathlib.Path(vllm.submodule_search_locations[0]) / "_flashmla_C.abi3.so"
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"FlashMLA's shared object is not at {path}")
    return path


class FlashMLA:
    """FlashMLA's dense decode as vllm ships it, replayed from a CUDA graph."""

    name = FLASHMLA_NAME

    def __init__(self, path):
        import torch

        torch.ops.load_library(str(path))
        self._op = torch.ops._flashmla_C.dense_decode_fwd

    def supports(self, case):
        return case.page_block_size == 64

    def _call(self, case, q, pool, table, lengths, metadata, splits):
        scale = HEAD_DIM_K**-0.5
        return self._op(
            q, pool, HEAD_DIM_V, lengths, table, scale, case.causal, metadata, splits, None
        )

    def prepare(self, case, pool, qs, tables, lengths):
        """(a round of one call on each input set, its Outputs).

        All arguments are JAX arrays that torch reads in place; the metadata is made here,
        outside the round.
        """
        import jax
        import torch

        jax.block_until_ready((pool, qs, tables, lengths))
        pool, lengths = torch.from_dlpack(pool), torch.from_dlpack(lengths)
        inputs = [
            (torch.from_dlpack(q), torch.from_dlpack(table))
            for q, table in zip(qs, tables, strict=True)
        ]

        def calls(metadata, splits):
            return [
                self._call(case, q, pool, table, lengths, metadata, splits) for q, table in inputs
            ]

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            q, table = inputs[0]
            metadata, splits = self._call(case, q, pool, table, lengths, None, None)[2:4]
            self._call(case, q, pool, table, lengths, metadata, splits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = calls(metadata, splits)
        for result in results:
            result[0].fill_(float("nan"))
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()

        outs = [jax.dlpack.from_dlpack(result[0].contiguous()) for result in results]
        lses = [
            jax.dlpack.from_dlpack(result[1].clone(memory_format=torch.contiguous_format))
            for result in results
        ]
        keep = (pool, lengths, inputs, metadata, splits, results)
        round_ = Round(len(inputs), graph.replay, torch.cuda.synchronize, keep)
        return round_, Outputs(outs, lses)
