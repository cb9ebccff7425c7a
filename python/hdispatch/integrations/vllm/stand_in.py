"""Replaces a class of vLLM's by one of ours, and restores it; only if vLLM's code is the version that ours was written for."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from . import settings


def difference(parts: Sequence[Any], fingerprint: str) -> str:
    """How code of vLLM's differs from that for which ours was written; empty if it does not.

    parts        functions, classes and Triton kernels
    fingerprint  sha256 of their sources, one after the other
    """
    found = hashlib.sha256()
    for each in parts:
        try:
            found.update(inspect.getsource(getattr(each, "fn", each)).encode())
        except (OSError, TypeError) as error:
            return f"there is no source of {getattr(each, '__qualname__', each)} to compare: {error}"
    if found.hexdigest() != fingerprint:
        return f"its code is {found.hexdigest()[:12]}, not {fingerprint[:12]}, for which hdispatch's was written"
    return ""


@dataclass
class StandIn:
    """What stands in for a class that vLLM lets no plug-in choose.

    module, name     where vLLM looks for the class
    what             it is, in the log's words
    variable, is_on  the setting that leaves vLLM's own in place, and whether it asks for ours
    parts            functions, classes and Triton kernels of vLLM's that ours replaces, calls or reads
    fingerprint      sha256 of their sources in the vLLM that ours was written for
    """

    module: ModuleType
    name: str
    what: str
    variable: str
    is_on: Callable[[], bool]
    parts: Sequence[Any]
    fingerprint: str
    original: Any = field(init=False)

    def __post_init__(self) -> None:
        self.original = getattr(self.module, self.name)

    def objection(self) -> str:
        """Why vLLM's own stays; empty if ours takes its place."""
        if not self.is_on():
            return f"{self.variable} is 0"
        return difference(self.parts, self.fingerprint)

    def install(self, ours: type) -> None:
        """Put ours in the place of vLLM's class, or say in the log why not."""
        reason = self.objection()
        if reason:
            settings.logger.warning("hdispatch: vLLM's own %s stays: %s", self.what, reason)
        else:
            setattr(self.module, self.name, ours)

    def uninstall(self) -> None:
        """Put vLLM's class back; objects that were made stay as they are."""
        setattr(self.module, self.name, self.original)
