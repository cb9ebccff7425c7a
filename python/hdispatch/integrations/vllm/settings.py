"""Environment variables of the plug-in: HDISPATCH, the switch; HDISPATCH_ATTENTION, _REPLAY, _RUNNER, _METRICS_PORT."""

from __future__ import annotations

import logging
import os
import threading

import torch

from ... import runtime
from ...errors import HdispatchError

SWITCH = "HDISPATCH"
ATTENTION = "HDISPATCH_ATTENTION"
REPLAY = "HDISPATCH_REPLAY"
RUNNER = "HDISPATCH_RUNNER"
METRICS_PORT = "HDISPATCH_METRICS_PORT"
#: Value of HDISPATCH_ATTENTION -> attention of decode steps.
ATTENTIONS = {
    "auto": "attention_half where the bundle has rows, but under the CUDA graphs of long models",
    "half": "attention_half where the bundle has rows",
    "fa3": "FlashAttention 3",
}

#: A child of vLLM's logger, so that its level and format apply.
logger = logging.getLogger("vllm.hdispatch")

_LOADING = threading.Lock()


def is_on() -> bool:
    """Whether HDISPATCH is 1. `HdispatchError` for a value that is neither 1 nor, for no, 0 or nothing."""
    asked = os.environ.get(SWITCH, "")
    if asked not in ("", "0", "1"):
        raise HdispatchError(f"{SWITCH} is {asked!r}; it takes 1 (serve vLLM with hdispatch) or 0 (do not)")
    return asked == "1"


def attention() -> str:
    """HDISPATCH_ATTENTION, one of `ATTENTIONS`; "auto" if it is not set. `HdispatchError` for another value."""
    asked = os.environ.get(ATTENTION, "") or "auto"
    if asked not in ATTENTIONS:
        raise HdispatchError(f"{ATTENTION} is {asked!r}; it takes {', '.join(ATTENTIONS)}")
    return asked


def replay() -> bool:
    """Whether decode steps that come again are replayed: HDISPATCH_REPLAY, 1 if not set. `HdispatchError` for another value."""
    return _flag(REPLAY, "replay decode steps that come again", "launch each kernel")


def runner() -> bool:
    """Whether vLLM's model runner is ours in decode steps: HDISPATCH_RUNNER, 1 if not set. `HdispatchError` likewise."""
    return _flag(RUNNER, "prepare and end decode steps by one launch each", "vLLM's own model runner and sampler")


def _flag(name: str, yes: str, no: str) -> bool:
    """The value of a variable, on if it is not set. yes and no say what it switches."""
    asked = os.environ.get(name, "") or "1"
    if asked not in ("0", "1"):
        raise HdispatchError(f"{name} is {asked!r}; it takes 1 ({yes}) or 0 ({no})")
    return asked == "1"


def metrics_port() -> int:
    """HDISPATCH_METRICS_PORT, where the worker of cuda:0 serves its metrics; 0 for none. `HdispatchError` for another value."""
    asked = os.environ.get(METRICS_PORT, "") or "0"
    if not (asked.isascii() and asked.isdecimal() and int(asked) < 65536):
        raise HdispatchError(f"{METRICS_PORT} is {asked!r}; it takes a port, 1 to 65535, or 0 (serve no metrics)")
    return int(asked)


def load_bundle(device: torch.device) -> None:
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
