"""Host functions that return what returned_rows does, or something else; run in a worker process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hdispatch.compile.call_maker import CallMaker
from hdispatch.compile.trace import trace
from hdispatch.errors import BuildError
from returned_rows.spec import SPEC


class Kernel:
    """Stands for one of Triton's, of one pointer."""

    __name__ = "kernel"

    class _Param:
        name = "pointer"

    params = (_Param,)

    @staticmethod
    def fn(pointer: Any) -> None:
        """Takes a pointer."""


def total(x: Any) -> Any:
    return torch.zeros(4, dtype=torch.int32, device=x.device)


#: What each returns; the kernel gets the first.
MADE: dict[str, Callable[[Any], Any]] = {
    "good": lambda x: (torch.empty_like(x), total(x)),
    "one": torch.empty_like,
    "nothing": lambda x: None,  # noqa: ARG005
    "an_argument": lambda x: (x, total(x)),
    "zeros": lambda x: (torch.zeros_like(x), total(x)),
    "no_zeros": lambda x: (torch.empty_like(x), x.new_empty(4, dtype=torch.int32)),
    "another_dtype": lambda x: (torch.empty_like(x, dtype=torch.int8), total(x)),
    "another_rank": lambda x: (x.new_empty(3), total(x)),
    "another_width": lambda x: (x.new_empty((x.shape[0], 128)), total(x)),
    "a_part": lambda x: (torch.empty_like(x)[:, :128], total(x)),
    "computed": lambda x: (x + 1, total(x)),
    "longer_beyond_100": lambda x: (x.new_empty((x.shape[0] + (x.shape[0] > 100), x.shape[1])), total(x)),
    "transposed": lambda x: (x.new_empty((x.shape[1], x.shape[0])).t(), total(x)),
}


def problem(name: str, m: int | None) -> str:
    """What tracing the host function says, with a symbolic M or a known one; "ok" for nothing."""

    def host(x: Any, scale: Any, _launcher: Any) -> Any:
        result = MADE["good" if name == "kept" else name](x)
        first = result[0] if isinstance(result, tuple) else x
        _launcher(Kernel(), (1,), torch.empty_like(x) if name == "kept" else first)
        return result

    maker = CallMaker(SPEC, SPEC.variants()[0], {"K": 256}, allocates=True)
    try:
        found = trace(host, maker.symbolic(64) if m is None else maker.concrete(m))
    except BuildError as error:
        return str(error)
    assert found.launch.args["pointer"].arg == "out"  # type: ignore[union-attr]
    return "ok"
