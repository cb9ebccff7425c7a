"""From timings: what one backend reaches of the best other one, per op and bucket of M."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..compile.measurements import Measurements
from ..compile.op_package import OpPackage
from ..compile.target import short_name
from ..errors import BuildError
from .measured import Measured
from .timings import Timing, unlike_cards


@dataclass(frozen=True)
class Share:
    """An op's times at the upper edge of a bucket.

    share   the best other backend's time over this one's, 1 being as fast: the geometric mean over sizes
    worst   the least of them
    other   the backend that is best at most of the sizes
    cells   sizes at which both have a time
    """

    op: str
    m: int
    share: float
    worst: float
    other: str
    cells: int


def compare(timings: Sequence[Timing], packages: Mapping[str, OpPackage], backend: str, tuned: bool = False) -> list[Share]:
    """The shares of `backend`, by op and M. BuildError for timings of unlike cards, or where there is nothing to compare.

    tuned  where the timings have no other backend: against what the config files of this GPU were chosen by, in another run
    """
    if cards := unlike_cards(timings):
        raise BuildError(f"the timings are of unlike cards, {' and '.join(cards)}; compare those of one at a time")
    found = []
    for op in sorted({timing["op"] for timing in timings}):
        spec = packages[op].spec
        own = [timing for timing in timings if timing["op"] == op]
        measured = Measured(spec, own)
        before = Measurements(spec, packages[op].configs / f"nvidia_{short_name(own[0]['gpu'])}.json") if tuned else None
        by_m: dict[int, list[tuple[float, str]]] = {}
        for slot in measured.times:
            times = measured.by_backend(slot)
            others = {name: us for name, us in times.items() if name != backend}
            if before is not None and not others:
                variant = next(iter(measured.times[slot]))[0]
                known = before.by_backend(variant, dict(slot[0]), spec.ladders.edges(slot[1]))
                others = {name: us for name, us in known.items() if name != backend}
            if backend in times and others:
                best = min(others, key=others.__getitem__)
                by_m.setdefault(spec.ladders.edges(slot[1])["M"], []).append((others[best] / times[backend], best))
        for m, cells in sorted(by_m.items()):
            shares, names = [share for share, _ in cells], [name for _, name in cells]
            found.append(Share(op, m, statistics.geometric_mean(shares), min(shares), statistics.mode(names), len(cells)))
    if not found:
        raise BuildError(f"no cell of the timings has a time of {backend} and one of another backend")
    return found
