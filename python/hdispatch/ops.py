"""The public ops and nothing else: `hdispatch.ops.<op>`, the same as `torch.ops.hdispatch.<op>`.

`hdispatch.registry` puts them here and finds them by name. An op may be called before any bundle is loaded: then each call is a
miss and runs the op's torch reference.
"""

from . import _C


def _look_for(_name: str) -> bool:
    """Whether an installed distribution has the op: `hdispatch.registry` puts its own function here."""
    return False


def __getattr__(name: str) -> _C.Op:
    if _look_for(name):
        found: _C.Op = globals()[name]
        return found
    there = ", ".join(sorted(found for found in globals() if not found.startswith("_")))
    raise AttributeError(f"hdispatch has no op {name!r}; it has {there or 'none'}")
