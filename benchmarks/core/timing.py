"""Timing of rounds: a round is a fixed number of calls, each on inputs of its own.

Our rounds and a peer's are timed alike: many rounds are enqueued, and the host waits once at the
end. They take turns, so that the clock and the heat of the card are the same for all.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable


@dataclasses.dataclass
class Round:
    """One round: `enqueue` starts its calls, `wait` returns when all calls so far have ended."""

    calls: int
    enqueue: Callable[[], None]
    wait: Callable[[], None]
    keep: tuple = ()  # what must live as long as the round


@dataclasses.dataclass(frozen=True)
class Timing:
    us: float  # a call; the median of the repeats
    spread: float  # (slowest - fastest) / median of the repeats
    host_us: float  # a call: what the host takes to enqueue it on an idle device
    sm_mhz: int | None  # the SM clock during the last repeat

    @property
    def host_bound(self):
        """Whether the host may not enqueue fast enough for the device."""
        return self.host_us > 0.8 * self.us


def _seconds(round_, rounds):
    start = time.perf_counter()
    for _ in range(rounds):
        round_.enqueue()
    round_.wait()
    return time.perf_counter() - start


def _host_seconds(round_):
    round_.wait()
    start = time.perf_counter()
    round_.enqueue()
    enqueued = time.perf_counter() - start
    round_.wait()
    return enqueued


def time_rounds(rounds, *, repeats, seconds, rest=0.0, sm_clock=None):
    """Times rounds that take turns: {name: Round} -> {name: Timing}.

    A repeat is a burst of rounds that lasts about `seconds`, and a second burst of three times as
    many. The difference of the two counts, so that starting and awaiting a burst does not. Before
    each burst the device rests for `rest` seconds. Without rests one round's heat slows the next
    one: the card caps its power over a longer time than a burst lasts.
    """
    counts, host, times, clocks = {}, {}, {}, {}
    for name, round_ in rounds.items():
        _seconds(round_, 3)
        each = min(_seconds(round_, 2) for _ in range(2)) / 2
        counts[name] = max(1, round(seconds / each))
        host[name] = statistics.median(_host_seconds(round_) for _ in range(3))
        times[name] = []
    for repeat in range(repeats):
        for name, round_ in rounds.items():
            time.sleep(rest)
            short = _seconds(round_, counts[name])
            time.sleep(rest)
            start = time.perf_counter()
            for _ in range(3 * counts[name]):
                round_.enqueue()
            # The clock is read while the device still works through what is enqueued.
            if sm_clock is not None and repeat == repeats - 1:
                clocks[name] = sm_clock()
            round_.wait()
            elapsed = time.perf_counter() - start - short
            times[name].append(1e6 * elapsed / (2 * counts[name] * round_.calls))
    return {
        name: Timing(
            us=statistics.median(values),
            spread=(max(values) - min(values)) / statistics.median(values),
            host_us=1e6 * host[name] / rounds[name].calls,
            sm_mhz=clocks.get(name),
        )
        for name, values in times.items()
    }
