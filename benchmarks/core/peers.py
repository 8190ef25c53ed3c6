"""How a peer is found, and how its calls become a round: one CUDA graph of PyTorch, or a jit."""

import dataclasses
import functools
import importlib.util
import os
import pathlib

import jax

from core.op import Peer
from core.power import attempt
from core.rounds import DonatedRound, poison
from core.timing import Round, time_rounds


def find_library(name, variable):
    """The path of a shared object of vllm: $`variable`, or an installed vllm's."""
    path = os.environ.get(variable)
    if path is None:
        vllm = importlib.util.find_spec("vllm")
        if vllm is None:
            raise FileNotFoundError(f"set {variable} or install vllm")
        path = pathlib.Path(vllm.submodule_search_locations[0]) / name
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{name} is not at {path}")
    return path


def version_of(path, given=None):
    """Such as "vllm 0.26.0": as given, or as the wheel's metadata beside its folder says."""
    folders = [
        folder.name for above in path.parents[:3] for folder in above.glob("vllm-*.dist-info")
    ]
    found = given or (folders[0].removesuffix(".dist-info").split("-")[1] if folders else None)
    return f"vllm {found or 'of unknown version'}"


def load_flashmla(options):
    """(FlashMLA's functions in PyTorch, what rows call it)."""
    path = find_library("_flashmla_C.abi3.so", "FLASHMLA_SO")
    import torch

    torch.ops.load_library(str(path))
    return torch.ops._flashmla_C, f"FlashMLA ({version_of(path, options.vllm)})"


def load_flash_attention(options):
    """(FlashAttention-3's functions in PyTorch, what rows call it)."""
    path = find_library("vllm_flash_attn/_vllm_fa3_C.abi3.so", "FA3_SO")
    import torch

    torch.ops.load_library(str(path))
    return torch.ops._vllm_fa3_C, f"FlashAttention-3 ({version_of(path, options.vllm)})"


def fastest_round(makers):
    """Of {label: () -> (a Round, its results)} the fastest in a short timing. It takes its label.

    One that raises is left out.
    """
    made = {label: attempt(make, label) for label, make in makers.items()}
    rounds = {label: found for label, found in made.items() if found is not None}
    if not rounds:
        raise RuntimeError(f"none of {', '.join(makers)} works")
    times = time_rounds({label: one for label, (one, _) in rounds.items()}, repeats=2, seconds=2e-3)
    label = min(times, key=lambda label: times[label].us)
    round_, results = rounds[label]
    return dataclasses.replace(round_, label=label), results


def graph_round(prepare, arrays, inputs):
    """(a Round of one call for each of `inputs`, the results of each call, as JAX arrays).

    Args:
      prepare: (arrays, first input) -> (call, what must live as long as the round). It makes plans
        and casts, and warms up. call(one input) is what is captured; it returns a tuple of tensors.
      arrays, inputs: JAX arrays in a pytree, and one such pytree for each call. PyTorch reads them
        in place.
    """
    import torch

    jax.block_until_ready((arrays, inputs))
    arrays, inputs = jax.tree.map(torch.from_dlpack, (arrays, inputs))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call, kept = prepare(arrays, inputs[0])
        call(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        results = [call(one) for one in inputs]
    for result in results:
        result[0].fill_(float("nan"))
    torch.cuda.synchronize()
    graph.replay()
    torch.cuda.synchronize()

    def to_jax(out, *others):
        """The first result in place, as it is large; the others may have strides of their own."""
        copies = [x.clone(memory_format=torch.contiguous_format) for x in others]
        return tuple(jax.dlpack.from_dlpack(x) for x in (out.contiguous(), *copies))

    kept = arrays, inputs, results, kept
    round_ = Round(len(inputs), graph.replay, torch.cuda.synchronize, kept)
    return round_, [to_jax(*result) for result in results]


class JaxPeer(Peer):
    """A peer that is a function of JAX: call(way, pool, shared, own) -> a tuple of results."""

    def __init__(self, name, call, ways=("",), column=None):
        self.name, self.column, self._call, self._ways = name, column, call, ways

    def ways(self, case):
        return self._ways

    def prepare(self, case, way, pool, shared, owns):
        def run(results, pool, shared, owns):
            found = []
            for own in owns:  # one after the other, so that they share their temporary memory
                own = jax.lax.optimization_barrier((own, found[-1:]))[0]
                found.append(self._call(way, pool, shared, own))
            return found

        one = jax.eval_shape(functools.partial(self._call, way), pool, shared, owns[0])
        buffers = [tuple(poison(x) for x in one) for _ in owns]
        function = jax.jit(run, donate_argnums=0, keep_unused=True)
        round_ = DonatedRound(function, buffers, (pool, shared, owns), len(owns))
        round_.round.enqueue()  # compiles
        return round_.round, round_.results
