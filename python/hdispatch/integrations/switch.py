"""What plug-ins share: HDISPATCH, which switches them on, and the bundle, loaded when a process has chosen its device."""

from __future__ import annotations

import logging
import os
import threading

import torch

from .. import runtime
from ..errors import HdispatchError

SWITCH = "HDISPATCH"

_LOADING = threading.Lock()


def is_on(server: str) -> bool:
    """Whether HDISPATCH is 1. `HdispatchError` for a value that is neither 1 nor, for no, 0 or nothing.

    server  the name of what would be served
    """
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "0", "1"):
        raise HdispatchError(f"{SWITCH} is {asked!r}; it takes 1 (serve {server} with hdispatch) or 0 (do not)")
    return asked == "1"


def load_bundle(device: torch.device, logger: logging.Logger) -> None:
    """Load the default bundle (`hdispatch.load`) for a CUDA device, unless one serves it already. Nothing for another device.

    Call it when the process has chosen its device, as tensor parallel workers do after plug-ins are registered. Raises what
    `hdispatch.load` raises.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with _LOADING:
        if any(bundle.device == index for bundle in runtime.loaded()):
            return
        bundle = runtime.load(device=index)
    logger.info("hdispatch: %d rows of %s serve cuda:%d", bundle.rows, bundle.folder, index)
