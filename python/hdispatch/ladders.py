"""The buckets of an op: intervals of M and, beside them, of one run-time integer. A bucket is an index into both at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ladders:
    """The upper edges of an op's buckets, ascending; the last bucket of each ladder has no upper end.

    m        of M
    arg      the integer argument with the second ladder; None: the op has none
    second   its edges; a bucket's number is `number of M's * len(second) + number of the integer's`, as csrc/runtime.h has it
    """

    m: tuple[int, ...]
    arg: str | None = None
    second: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of buckets."""
        return len(self.m) * self._width

    @property
    def _width(self) -> int:
        return len(self.second) if self.arg is not None else 1

    def split(self, bucket: int) -> tuple[int, int]:
        """The numbers of M's bucket and of the second integer's, 0 where there is none."""
        return divmod(bucket, self._width)

    def index(self, m: int, second: int | None = None) -> int:
        """The bucket that serves these values; without `second` the first one of that M."""
        return bucket_index(self.m, m) * self._width + (0 if second is None else bucket_index(self.second, second))

    def of_m(self, number: int) -> range:
        """The buckets of one bucket of M."""
        return range(number * self._width, (number + 1) * self._width)

    def of_second(self, second: int) -> range:
        """The buckets in which the second integer may have that value."""
        return range(bucket_index(self.second, second), self.count, self._width)

    def edges(self, bucket: int) -> dict[str, int]:
        """The sizes at the bucket's upper edges: {"M": 16, "max_seq_len": 512}."""
        m, second = self.split(bucket)
        return {"M": self.m[m]} | ({self.arg: self.second[second]} if self.arg is not None else {})

    def bounds(self, bucket: int) -> tuple[int, int | None]:
        """First and last M of a bucket; None: it has no end."""
        return bucket_bounds(self.m, self.split(bucket)[0])

    def second_bounds(self, bucket: int) -> tuple[int, int | None]:
        """The same of the second integer; of an op that has one."""
        return bucket_bounds(self.second, self.split(bucket)[1])

    def near(self, bucket: int, spread: int) -> list[int]:
        """The buckets up to `spread` steps away along either ladder, the nearest first."""
        m, second = self.split(bucket)
        found = []
        for step in range(1, spread + 1):
            for by in (-step, step):
                if 0 <= m + by < len(self.m):
                    found.append((m + by) * self._width + second)
                if 0 <= second + by < self._width:
                    found.append(m * self._width + second + by)
        return found


def bucket_index(ladder: Sequence[int], value: int) -> int:
    """Index of the bucket that holds a value: the first edge at or above it, else the last. The C++ ladder agrees (tested)."""
    return next((i for i, edge in enumerate(ladder) if value <= edge), len(ladder) - 1)


def bucket_bounds(ladder: Sequence[int], bucket: int) -> tuple[int, int | None]:
    """First and last value of a bucket of one ladder; None for the last bucket, which has no end."""
    first = 1 if bucket == 0 else ladder[bucket - 1] + 1
    return first, (None if bucket == len(ladder) - 1 else ladder[bucket])
