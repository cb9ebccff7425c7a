"""Whether a machine is busy with something else: what an empty Python call takes here, against what it takes on an idle one."""

from __future__ import annotations

import statistics

from ..testing.host_timer import quiet, time_calls

#: ns per empty call on the slowest idle machine in benchmarks/results, with Python 3.11 and 3.12.
USUAL_NS = 41.2
#: Busy from this multiple on: a shared core that does something else too gives 1.5 to 2.
BUSY = 1.25


def empty_call_ns(batches: int = 30, calls: int = 200) -> float:
    """ns per call of an empty Python function of seven parameters, the loop included: the median over batches, in 2 ms."""

    def empty(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None: ...

    batch = [(0, 1, 2, 3, 4, 5, 6)] * calls
    with quiet():
        time_calls(empty, batch)
        return statistics.median(time_calls(empty, batch) for _ in range(batches))


def is_busy(ns: float) -> bool:
    """Whether an empty call that takes so long says that the machine is busy, or that it is slow."""
    return ns > USUAL_NS * BUSY


def describe(ns: float) -> str:
    """Warning for a busy machine."""
    return (
        f"this machine is busy or slow: an empty Python call takes {ns:.0f} ns, usually at most {USUAL_NS:.0f}; "
        "host times measured now are too long by about as much"
    )
