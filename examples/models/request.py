"""A request of continuous batching, and the values that `submit` refuses.

One step runs all requests. So a value that no step can take is refused when it is submitted.
"""

import dataclasses
import numbers
import operator
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt and the tokens generated for it. `ContinuousBatcher.submit` makes it."""

    number: int  # in the order of submission
    tokens: list[int]  # the prompt, then the generated ones, with the end-of-sequence token
    prompt_length: int
    max_tokens: int
    options: dict[str, float | int]  # for sampling
    cached: int = 0  # tokens in the cache while it runs
    reused: int = 0  # tokens that were in the cache already when it was last admitted
    preemptions: int = 0
    finish_reason: str | None = None  # "stop", "length" or "cancelled"

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[self.prompt_length :]


def check_tokens(name: str, tokens: Sequence[int], vocab: int | None = None) -> list[int]:
    """The tokens as a list of ints.

    Raises:
      ValueError: there is none, or one is no int from 0 to vocab - 1 (without `vocab`, no int32).
    """
    try:
        tokens = list(tokens)
    except TypeError:
        raise ValueError(f"{name} must be a list of tokens, got {tokens!r}") from None
    if not tokens:
        raise ValueError(f"{name} must have at least one token, got none")
    largest = 2**31 - 1 if vocab is None else vocab - 1
    return [check_integer(f"{name}[{i}]", token, 0, largest) for i, token in enumerate(tokens)]


def check_integer(name: str, value, smallest: int, largest: int | None = None) -> int:
    """The value as an int. Raises ValueError if it is none, or out of range."""
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an int, got {value!r}") from None
    if number < smallest or (largest is not None and number > largest):
        limits = f"at least {smallest}" if largest is None else f"from {smallest} to {largest}"
        raise ValueError(f"{name} must be {limits}, got {number}")
    return number


def check_option(name: str, value, default: float | int) -> float | int:
    """The value of an option, as its default's type: a finite f32 or an i32."""
    if not isinstance(default, float):
        return check_integer(name, value, -(2**31), 2**31 - 1)
    largest = float(np.finfo(np.float32).max)
    if not isinstance(value, numbers.Real) or not abs(value) <= largest:  # neither if it is NaN
        raise ValueError(f"{name} must be a finite float32 number, got {value!r}")
    return float(value)
