"""Checks of arguments. Each message names the argument, what it must be and what it is."""

import math
import numbers

import jax
import numpy as np


def check_array(name: str, x, axes: str, dtypes=None) -> None:
    """Checks rank and dtype; `axes` is the shape in words, as "b s_q h_q d_k"."""
    names = axes.split()
    if x.ndim != len(names):
        raise ValueError(f"{name} must have shape [{', '.join(names)}], got {list(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        allowed = " or ".join(np.dtype(d).name for d in dtypes)
        raise TypeError(f"{name} must have dtype {allowed}, got {x.dtype.name}")


def check_axis(name: str, x, axis: int, expected: int, why: str) -> None:
    """Checks one axis of an array against the size that another argument gives it."""
    if x.shape[axis] != expected:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, but axis {axis} must be {expected}, {why}"
        )


def check_offset_has_mask(causal: bool) -> None:
    if not causal:
        raise ValueError(
            "causal_offset moves the boundary of the causal mask, which causal=False turns off; "
            "pass causal=True with it, also for one query a sequence, or leave it out"
        )


def static_int(name: str, value, minimum: int = 1) -> int:
    """A Python (or numpy) integer of at least `minimum`; a traced or device value raises."""
    if isinstance(value, jax.Array) or not isinstance(value, numbers.Integral | np.integer):
        raise TypeError(f"{name} must be a static Python int, got {_describe(value)}")
    if isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an int of at least {minimum}, got {value}")
    return int(value)


def static_bool(name: str, value) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be a static Python bool, got {_describe(value)}")
    return bool(value)


def static_positive_float(name: str, value) -> float:
    """A Python (or numpy) number, finite and above 0 also in float32."""
    if isinstance(value, jax.Array | bool) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(f"{name} must be a static Python number, got {_describe(value)}")
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded) or rounded <= 0:
        raise ValueError(f"{name} must be finite and above 0 in float32, got {value}")
    return rounded


def _describe(value) -> str:
    if isinstance(value, jax.core.Tracer):
        return f"the traced value {value}"
    return f"{value!r} of type {type(value).__name__}"
