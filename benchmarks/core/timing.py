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
    label: str = ""  # of a peer: how its calls were made, where it chose among several ways


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


def nothing():
    pass


def burst(round_, rounds, meanwhile=nothing):
    """(the seconds of so many rounds, what `meanwhile` returns while the device is still busy)."""
    start = time.perf_counter()
    for _ in range(rounds):
        round_.enqueue()
    found = meanwhile()
    round_.wait()
    return time.perf_counter() - start, found


def _host_seconds(round_):
    round_.wait()
    start = time.perf_counter()
    round_.enqueue()
    enqueued = time.perf_counter() - start
    round_.wait()
    return enqueued


def time_rounds(rounds, *, repeats, seconds=0.005, rest=0.0, sm_clock=nothing):
    """Times rounds that take turns: {name: Round} -> {name: Timing}.

    A repeat is a burst of rounds that lasts about `seconds`, and a second burst of three times as
    many. The difference of the two counts, so that starting and awaiting a burst does not. Before
    each burst the device rests for `rest` seconds. Without rests one round's heat slows the next
    one: the card caps its power over a longer time than a burst lasts.
    """
    counts, host, times, clocks = {}, {}, {}, {}
    for name, round_ in rounds.items():
        burst(round_, 3)
        each = min(burst(round_, 2)[0] for _ in range(2)) / 2
        counts[name] = max(1, round(seconds / each))
        host[name] = statistics.median(_host_seconds(round_) for _ in range(3))
        times[name] = []
    for repeat in range(repeats):
        meanwhile = sm_clock if repeat == repeats - 1 else nothing
        for name, round_ in rounds.items():
            time.sleep(rest)
            short, _ = burst(round_, counts[name])
            time.sleep(rest)
            long, clocks[name] = burst(round_, 3 * counts[name], meanwhile)
            times[name].append(1e6 * (long - short) / (2 * counts[name] * round_.calls))
    return {
        name: Timing(
            us=statistics.median(values),
            spread=(max(values) - min(values)) / statistics.median(values),
            host_us=1e6 * host[name] / rounds[name].calls,
            sm_mhz=clocks[name],
        )
        for name, values in times.items()
    }
