"""Interleaved timing: every implementation takes one turn a round, so that a drifting clock hurts all alike."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping


@dataclasses.dataclass(frozen=True)
class Timed:
    """What runs (queues work and returns something) and what waits for the last thing it returned."""

    run: Callable[[], object]
    wait: Callable[[object], object]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Milliseconds a call: the median over the rounds, and the 20th and 80th percentiles."""

    ms: float
    ms_p20: float
    ms_p80: float


def interleaved(candidates: Mapping[str, Timed], rounds: int = 5, seconds: float = 0.1) -> dict[str, Spread]:
    """Times each candidate in each round, in turn, for about `seconds` a turn."""
    calls = {name: _calls_in(timed, seconds) for name, timed in candidates.items()}
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, timed in candidates.items():
            samples[name].append(_milliseconds(timed, calls[name]))
    return {name: _spread(found) for name, found in samples.items()}


def _milliseconds(timed: Timed, calls: int) -> float:
    """Mean time of `calls` calls queued back to back, waited for once.

    One more goes before them, untimed: it pays for what the implementation before left behind, such as
    gigabytes that the kernel is still taking back.
    """
    timed.wait(timed.run())
    start = time.perf_counter()
    for _ in range(calls):
        result = timed.run()
    timed.wait(result)
    return 1e3 * (time.perf_counter() - start) / calls


def _calls_in(timed: Timed, seconds: float) -> int:
    """How many calls fill the time; compiles and warms up on the way."""
    timed.wait(timed.run())
    if _milliseconds(timed, 1) >= 1e3 * seconds:
        return 1
    return max(1, min(1000, int(1e3 * seconds / min(_milliseconds(timed, 2), _milliseconds(timed, 3)))))


def _spread(samples: list[float]) -> Spread:
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    cuts = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), cuts[0], cuts[-1])
