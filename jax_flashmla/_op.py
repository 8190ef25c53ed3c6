"""How an op is defined: one JAX primitive with a kernel on Hopper and plain JAX elsewhere.

An op has two forms over the same arguments: `reference`, pure JAX, and `kernel`, pure JAX around
one FFI call. Which of them stands in a program is decided when it is lowered, by the platform and
by the static parameter `implementation`:

    "auto"  the kernel on CUDA where every local device is a Hopper GPU (or none is visible, as in
            lowering for another machine), else the reference. A Hopper machine that cannot run
            the kernel gets the reference and one warning that names the reason.
    "cuda"  the kernel, or an error.
    "xla"   the reference.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from . import _ffi

IMPLEMENTATIONS = ("auto", "cuda", "xla")


@dataclasses.dataclass(frozen=True)
class Op:
    """A primitive and the two forms of it.

    Attributes:
      name: the op's name in jaxprs and in messages.
      result_types: (*avals, **params) -> [(shape, dtype)], one for each result.
      reference: (*args, **params) -> results, in pure JAX.
      kernel: (*args, **params) -> results, the same through the FFI.
      kernel_gap: (*avals, **params) -> why there is no kernel for these shapes, or None.
      batch: (args, dims, **params) -> (results, dims): the batching rule.
    """

    name: str
    result_types: Callable[..., Sequence[tuple[tuple[int, ...], Any]]]
    reference: Callable[..., Sequence[jax.Array]]
    kernel: Callable[..., Sequence[jax.Array]]
    kernel_gap: Callable[..., str | None]
    batch: Callable[..., tuple[Sequence[jax.Array], Sequence[int | None]]]
    primitive: Primitive = dataclasses.field(init=False)

    def __post_init__(self):
        primitive = Primitive(self.name)
        primitive.multiple_results = True
        primitive.def_impl(functools.partial(_run_eagerly, primitive))
        primitive.def_abstract_eval(self._abstract_eval)
        mlir.register_lowering(primitive, self._lower_elsewhere)
        mlir.register_lowering(primitive, self._lower_for_cuda, platform="cuda")
        batching.primitive_batchers[primitive] = self.batch
        ad.primitive_jvps[primitive] = self._refuse_derivative
        ad.primitive_transposes[primitive] = self._refuse_derivative
        object.__setattr__(self, "primitive", primitive)

    def __call__(self, *args, implementation: str, **params) -> list[jax.Array]:
        """Binds the primitive; inside shard_map all operands vary over the same mesh axes."""
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}"
            )
        return self.primitive.bind(*_vary_alike(args), implementation=implementation, **params)

    def _abstract_eval(self, *avals, implementation, **params):
        for aval in avals:
            _refuse_explicit_sharding(self.name, aval)
        return [
            _aval_like(avals[0], shape, dtype)
            for shape, dtype in self.result_types(*avals, **params)
        ]

    def _refuse_derivative(self, *args, **params):
        raise NotImplementedError(
            f"{self.name} is an inference op and has no derivative; keep it out of what is "
            "differentiated, or wrap its inputs in jax.lax.stop_gradient"
        )

    def _lower_reference(self, ctx, *args, implementation, **params):
        return self._lower(self.reference, ctx, *args, **params)

    def _lower(self, form, ctx, *args, **params):
        named = jax.named_scope(self.name)(form)  # so that profiles show the op's name
        return mlir.lower_fun(named, multiple_results=True)(ctx, *args, **params)

    def _lower_elsewhere(self, ctx, *args, implementation, **params):
        if implementation == "cuda":
            platforms = ctx.platforms or ctx.module_context.platforms
            raise NotImplementedError(
                f"{self.name} has no kernel for the platform {'/'.join(platforms)}, and "
                'implementation="cuda" does not fall back; pass implementation="auto" or "xla"'
            )
        return self._lower_reference(ctx, *args, implementation=implementation, **params)

    def _lower_for_cuda(self, ctx, *args, implementation, **params):
        if not self._takes_kernel(ctx.avals_in, implementation, params):
            return self._lower_reference(ctx, *args, implementation=implementation, **params)
        _refuse_partitioning(self.name, ctx.module_context.axis_context)
        return self._lower(self.kernel, ctx, *args, **params)

    def _takes_kernel(self, avals, implementation, params) -> bool:
        if implementation == "xla":
            return False
        if implementation == "auto" and _ffi.other_device() is not None:
            return False  # not a Hopper machine: the reference is what it is meant to run
        missing, gap = _ffi.unavailable_reason(), self.kernel_gap(*avals, **params)
        if missing is None and gap is None:
            return True
        if implementation == "cuda":
            raise NotImplementedError(
                f'{self.name} with implementation="cuda": {missing or gap}; pass '
                'implementation="auto" or "xla" for the version in plain JAX'
            )
        if missing is not None:
            _warn_once(f"jax_flashmla runs in plain JAX, without its kernels: {missing}")
        else:
            _warn_once(f"{self.name} runs in plain JAX, without a kernel: {gap}")
        return False


def _run_eagerly(primitive, *args, **params):
    # The jitted function is the same object at every call with these parameters: only that lets
    # the second call of a shape find the first one's program.
    call = _jitted(primitive, tuple(sorted(params.items())))
    if jax.config.jax_disable_jit:
        with jax.disable_jit(False):
            return call(*args)
    return call(*args)


@functools.cache
def _jitted(primitive, params):
    def call(*args):
        return primitive.bind(*args, **dict(params))

    call.__name__ = primitive.name
    return jax.jit(call)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def varying_axes(x) -> frozenset:
    """The manual mesh axes over which `x` may differ from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def _vary_alike(args):
    """Casts each operand to the union of all operands' varying axes.

    A primitive's result takes its type from one operand. Were that one replicated and another
    varying, shard_map would take results that differ from device to device for one array.
    """
    union = frozenset().union(*map(varying_axes, args))
    return [
        jax.lax.pcast(x, tuple(union - varying_axes(x)), to="varying")
        if union - varying_axes(x)
        else x
        for x in args
    ]


def _aval_like(aval, shape, dtype):
    """An abstract value on the mesh and the varying axes of `aval`, sharded over none."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*(None for _ in shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _refuse_explicit_sharding(name, aval):
    if any(axis is not None for axis in aval.sharding.spec):
        raise NotImplementedError(
            f"{name} got an operand of type {aval.str_short()}, sharded over explicit mesh axes, "
            "outside jax.shard_map; wrap the call in jax.shard_map"
        )


def _refuse_partitioning(name, axis_context):
    """XLA cannot partition a custom call: it would gather every operand, the cache too."""
    manual = getattr(axis_context, "manual_axes", None)
    if manual is None:
        devices = getattr(axis_context, "num_devices", None) or 1
        where = f"in a jit over {devices} devices, outside jax.shard_map"
    else:
        automatic = {a: n for a, n in axis_context.mesh.shape.items() if a not in manual}
        devices = math.prod(automatic.values())
        where = f"in a jax.shard_map that leaves the mesh axes {automatic} to XLA"
    if devices > 1:
        raise NotImplementedError(
            f"{name} stands {where}: XLA would gather the whole cache on each device; call it "
            "inside a jax.shard_map over all axes of the mesh"
        )
