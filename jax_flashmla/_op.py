"""Defines an op: a JAX primitive that calls a kernel on Hopper GPUs and runs JAX ops elsewhere.

An op has two forms with the same arguments and results. `reference` consists of JAX ops. `kernel`
consists of JAX ops around one FFI call. JAX chooses between them when it lowers a program, by the
platform and by the op's argument `implementation`:

    "auto"  the kernel on a Hopper GPU, else the reference. If no CUDA device is visible, as in
            lowering for another machine, a Hopper GPU is assumed. A Hopper machine that cannot
            run the kernel gets the reference, and one warning that names the reason.
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
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import NamedSharding, PartitionSpec

from . import _ffi
from ._checks import check_implementation


@dataclasses.dataclass(frozen=True)
class Op:
    """A primitive and its two forms.

    Calling the op binds the primitive. Everything that JAX needs of a primitive is derived from
    the fields: its type rule, lowering, batching rule, and the refusal of derivatives.

    Attributes:
      name: the op's name in jaxprs and in profiles.
      result_types: (*avals, **params) -> [(shape, dtype)], one for each result.
      reference: (*args, **params) -> results, in JAX ops.
      kernel: (*args, **params) -> the same results, from the FFI call.
      kernel_gap: (*avals, **params) -> why there is no kernel for these shapes, or None.
      batch: (args, dims, **params) -> (results, dims), the batching rule. It also gets the
        param `implementation`; the functions above do not.
      public_name: what messages call the op: the public function, and how it was called. Default:
        the name.
    """

    name: str
    result_types: Callable[..., Sequence[tuple[tuple[int, ...], Any]]]
    reference: Callable[..., Sequence[jax.Array]]
    kernel: Callable[..., Sequence[jax.Array]]
    kernel_gap: Callable[..., str | None]
    batch: Callable[..., tuple[Sequence[jax.Array], Sequence[int | None]]]
    public_name: str = ""
    primitive: Primitive = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "public_name", self.public_name or self.name)
        primitive = Primitive(self.name)
        primitive.multiple_results = True
        # JAX's own rule for eager calls: jax_debug_nans and jax_debug_infs know it.
        primitive.def_impl(functools.partial(xla.apply_primitive, primitive))
        primitive.def_abstract_eval(self._abstract_eval)
        mlir.register_lowering(primitive, self._lower_elsewhere)
        mlir.register_lowering(primitive, self._lower_for_cuda, platform="cuda")
        batching.primitive_batchers[primitive] = self._batch
        ad.primitive_jvps[primitive] = self._refuse_derivative
        ad.primitive_transposes[primitive] = self._refuse_derivative
        object.__setattr__(self, "primitive", primitive)

    def __call__(self, *args: jax.Array, implementation: str, **params: Any) -> list[jax.Array]:
        """Binds the primitive. Inside shard_map all operands vary over the same mesh axes."""
        check_implementation(implementation)
        results: list[jax.Array] = self.primitive.bind(
            *_cast_to_same_varying_axes(args), implementation=implementation, **params
        )
        return results

    def _abstract_eval(self, *avals: Any, implementation: str, **params: Any) -> list[Any]:
        for aval in avals:
            _refuse_explicit_sharding(self.public_name, aval)
        return [
            _aval_like(avals[0], shape, dtype)
            for shape, dtype in self.result_types(*avals, **params)
        ]

    def _batch(
        self,
        args: Sequence[jax.Array],
        dims: Sequence[int | None],
        *,
        implementation: str,
        **params: Any,
    ) -> tuple[Sequence[jax.Array], Sequence[int | None]]:
        n = mapped_size(args, dims)
        if not isinstance(n, int) or n > 0:
            return self.batch(args, dims, implementation=implementation, **params)
        # No examples: there is nothing to fold, and no kernel to call.
        examples = [
            x
            if dim is None
            else jax.ShapeDtypeStruct((*x.shape[:dim], *x.shape[dim + 1 :]), x.dtype)
            for x, dim in zip(args, dims, strict=True)
        ]
        results = [jnp.zeros((0, *t), dtype) for t, dtype in self.result_types(*examples, **params)]
        results = _cast_to_same_varying_axes([*args, *results])[len(args) :]
        return results, [0] * len(results)

    def _refuse_derivative(self, *args: Any, **params: Any) -> None:
        raise NotImplementedError(
            f"{self.public_name} is an inference op and has no derivative; keep it out of what is "
            "differentiated, or wrap its inputs in jax.lax.stop_gradient"
        )

    def _lower_reference(self, ctx: Any, *args: Any, implementation: str, **params: Any) -> Any:
        return self._lower(self.reference, ctx, *args, **params)

    def _lower(self, form: Callable[..., Any], ctx: Any, *args: Any, **params: Any) -> Any:
        named = jax.named_scope(self.name)(form)  # so that profiles show the op's name
        return mlir.lower_fun(named, multiple_results=True)(ctx, *args, **params)

    def _lower_elsewhere(self, ctx: Any, *args: Any, implementation: str, **params: Any) -> Any:
        if implementation == "cuda":
            platforms = ctx.platforms or ctx.module_context.platforms
            raise NotImplementedError(
                f"{self.public_name} has no kernel for the platform {'/'.join(platforms)}, and "
                'implementation="cuda" does not fall back; pass implementation="auto" or "xla"'
            )
        return self._lower_reference(ctx, *args, implementation=implementation, **params)

    def _lower_for_cuda(self, ctx: Any, *args: Any, implementation: str, **params: Any) -> Any:
        if not self._takes_kernel(ctx.avals_in, implementation, params):
            return self._lower_reference(ctx, *args, implementation=implementation, **params)
        _refuse_partitioning(self.public_name, ctx.module_context.axis_context)
        return self._lower(self.kernel, ctx, *args, **params)

    def _takes_kernel(
        self, avals: Sequence[Any], implementation: str, params: dict[str, Any]
    ) -> bool:
        if implementation == "xla":
            return False
        if implementation == "auto" and _ffi.non_hopper_device() is not None:
            return False  # without a warning: such a GPU is meant to run the reference
        missing, gap = _ffi.unavailable_reason(), self.kernel_gap(*avals, **params)
        if missing is None and gap is None:
            return True
        if implementation == "cuda":
            raise NotImplementedError(
                f'{self.public_name}, with implementation="cuda": {missing or gap}; pass '
                'implementation="auto" or "xla" to run the reference, which consists of JAX ops'
            )
        if missing is not None:
            _warn_once(f"jax_flashmla runs its reference in JAX ops, not its kernels: {missing}")
        else:
            _warn_once(f"{self.public_name} runs its reference in JAX ops, not a kernel: {gap}")
        return False


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def mapped_size(args: Sequence[jax.Array], dims: Sequence[int | None]) -> Any:
    """The number of examples that vmap maps."""
    return next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)


def varying_axes(x: jax.Array) -> frozenset[Any]:
    """The manual mesh axes over which `x` may differ from device to device."""
    axes: frozenset[Any] = jax.typeof(x).manual_axis_type.varying
    return axes


def _cast_to_same_varying_axes(args: Sequence[jax.Array]) -> list[jax.Array]:
    """Casts each operand to the union of all operands' varying axes.

    A result takes its type from operand 0. If that one were replicated and another operand varying,
    shard_map would treat results that differ from device to device as replicated.
    """
    union = frozenset[Any]().union(*map(varying_axes, args))
    return [
        jax.lax.pcast(x, tuple(union - varying_axes(x)), to="varying")
        if union - varying_axes(x)
        else x
        for x in args
    ]


def _aval_like(aval: Any, shape: Sequence[Any], dtype: Any) -> Any:
    """An abstract value on the mesh and the varying axes of `aval`, sharded over no axis."""
    sharding = NamedSharding(aval.sharding.mesh, PartitionSpec(*(None for _ in shape)))
    return aval.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _refuse_explicit_sharding(name: str, aval: Any) -> None:
    if any(axis is not None for axis in aval.sharding.spec):
        raise NotImplementedError(
            f"{name} got an operand of type {aval.str_short()}, sharded over explicit mesh axes, "
            "outside jax.shard_map; wrap the call in jax.shard_map"
        )


def _refuse_partitioning(name: str, axis_context: Any) -> None:
    """Refuses a call that XLA would partition: it would gather every operand, the cache too."""
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
            f"{name} is called {where}: XLA would gather the whole cache on each device; call it "
            "inside a jax.shard_map over all axes of the mesh"
        )
