"""What the core must know of an op: an Op, its Cases, and the Peers that are timed beside it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from core import cards

# The tokens that one timed round names, so that the L2 (60 MB) does not serve them.
MIN_BYTES_IN_ALL = 300e6
# What one timed round must last, so that the host has time to dispatch the next one.
MIN_ROUND_US = 400.0
MIN_CALLS = 8
# Python takes up to 15 us a call to dispatch a round. A short one runs several times in a loop.
MIN_DISPATCH_US, MAX_LOOPS = 60.0, 8


class Case:
    """One shape of an op.

    A subclass is a frozen dataclass whose fields are the columns that name the shape. It has a
    `name` and says `flops()`, `moved_bytes()` (all that a call must read and write) and
    `token_bytes()` (what of it are tokens, which the L2 must not serve). Calls with few tokens need
    a larger `max_calls`, so that those of a round name MIN_BYTES_IN_ALL.
    """

    max_calls: ClassVar[int] = 64

    @property
    def shape_key(self):
        """The case whose programs this one runs: a ragged case may share those of a uniform one."""
        return self

    def compute_us(self, card=cards.H200):
        return 1e6 * self.flops() / card.flops

    def memory_us(self, card=cards.H200):
        return 1e6 * self.moved_bytes() / card.bytes

    def floor_us(self, card=cards.H200):
        """The least time that a call can take on the card, in microseconds."""
        return max(self.compute_us(card), self.memory_us(card))

    @functools.cached_property
    def calls(self):
        """How many calls, each on inputs of its own, make one timed round."""
        key = self.shape_key
        calls = max(MIN_BYTES_IN_ALL / key.token_bytes(), MIN_ROUND_US / max(key.floor_us(), 6.0))
        return min(max(math.ceil(calls), MIN_CALLS), self.max_calls)

    @functools.cached_property
    def loops(self):
        """How many times the round runs inside its jitted function."""
        return min(math.ceil(MIN_DISPATCH_US / max(self.shape_key.floor_us(), 6.0)), MAX_LOOPS)

    def row(self):
        """The columns of a result row that name the shape."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Op:
    """An op as the core sees it.

    A call reads `pool` (the same random tokens for all cases), `shared` (the same small arrays
    for all calls of a round, such as the lengths), what is prepared from these, and `own`: a pair
    of its own lists or tables and its own random arrays. Every call must read something of
    `shared`: this is how one turn of a looped round waits for the turn before.

    Attributes:
      name: the rows' "op".
      cases, quick, smoke: all cases; those of a quick run; tiny ones for the CPU.
      pool: (cases, calls) -> the pool, on the device. calls gives the calls of a case.
      lists: (case, pool, calls) -> (shared, [lists of each call]), NumPy arrays.
      draw: (case, key) -> the random arrays of a call. Jittable.
      call: (case, implementation, pool, shared, prepared, own) -> a tuple of results. Jittable;
        prepared is None where the call must prepare for itself.
      check: (case, pool, shared, own, found) -> {column: [the error of each of found]}. Jittable;
        found are tuples of results, ours and the peers'. The first column is "rel_err". See
        check.compare.
      prepare: (case, implementation, shared) -> what the calls share and may be given, such as a
        schedule. None where there is no such thing.
      peers: functions (options) -> a Peer, or None if it is not installed.
      limits: the largest error of each column.
      pool_key: cases with the same key share a pool.
      baseline: the cases that are timed with implementation="xla" and with `plain` too.
      plain: (case, pool, shared, own) -> a tuple of results. The program that a user of JAX would
        write without this library, whose sums are in float32 and whose inputs stay as they are.
      beside: {column: (another Op, which reads the same pool; case -> its case, or None)}: calls
        that are timed in turns with ours and fill a column.
      is_sustained: whether the card's power limits a case, so that it is timed under sustained
        load too.
      label, heading: of a row, what its line and its table are called in the report.
      labels: the title of the labels' column.
    """

    name: str
    cases: Sequence
    smoke: Sequence
    pool: Callable
    lists: Callable
    draw: Callable
    call: Callable
    check: Callable
    prepare: Callable | None = None
    quick: Sequence = ()
    peers: Sequence = ()
    limits: Mapping = dataclasses.field(default_factory=lambda: {"rel_err": 1e-2})
    pool_key: Callable = lambda case: None
    baseline: Sequence = ()
    plain: Callable | None = None
    beside: Mapping = dataclasses.field(default_factory=dict)
    is_sustained: Callable | None = None
    label: Callable = lambda row: row["case"]
    heading: Callable = lambda row: row["op"]
    labels: str = "case"

    def wrong(self, row):
        """The errors of a row that are above their limits, or NaN, in words; "" if none is."""
        return ", ".join(
            f"{name} {row[name]}"
            for name, limit in self.limits.items()
            if name in row and not row[name] <= limit
        )


class Peer:
    """Another library's kernel. `name` is what rows call it.

    With a `column` it is no peer but a call to compare with, such as another op of ours over as
    many tokens: its time goes into that column, and its results are not checked.
    """

    name: str
    column: str | None = None

    def ways(self, case) -> Sequence[str]:
        """The ways to call it that a user could choose; the fastest counts.

        None if it does not support the case. A single way may be called "".
        """
        raise NotImplementedError

    def prepare(self, case, way, pool, shared, owns):
        """(a Round of one call for each of `owns`, their results).

        Plans and casts are made here, so that they are not timed.
        """
        raise NotImplementedError
