"""Heuristics of adopted_aot.py, in the form in which Helion generates them; `asked` counts calls of the key function."""

from __future__ import annotations

from typing import Any

asked = 0
_CONFIGS = [{"block_sizes": [32, 32]}, {"block_sizes": [8, 64]}]


def key_tuned(*args: Any) -> int:
    """Select config index for the given arguments (also serves as cache key)."""
    global asked
    asked += 1
    return int(int(args[0].shape[0]) > 100)


def autotune_tuned(*args: Any) -> dict[str, Any]:
    """Select the optimal config for the given arguments."""
    return _CONFIGS[key_tuned(*args)]
