"""Environment variables of the plug-in: HDISPATCH, the switch, HDISPATCH_ATTENTION, _REPLAY, _RUNNER, _SCHEDULER and others."""

from __future__ import annotations

import logging
import os

import torch

from ...errors import HdispatchError
from .. import switch

SWITCH = switch.SWITCH
ATTENTION = "HDISPATCH_ATTENTION"
REPLAY = "HDISPATCH_REPLAY"
RUNNER = "HDISPATCH_RUNNER"
SCHEDULER = "HDISPATCH_SCHEDULER"
METRICS_PORT = "HDISPATCH_METRICS_PORT"
#: Value of HDISPATCH_ATTENTION -> attention of decode steps.
ATTENTIONS = {
    "auto": "attention_half where the bundle has rows, but under the CUDA graphs of long models",
    "half": "attention_half where the bundle has rows",
    "fa3": "FlashAttention 3",
}

#: A child of vLLM's logger, so that its level and format apply.
logger = logging.getLogger("vllm.hdispatch")


def is_on() -> bool:
    """Whether HDISPATCH is 1. `HdispatchError` for a value that is neither 1 nor, for no, 0 or nothing."""
    return switch.is_on("vLLM")


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


def scheduler() -> bool:
    """Whether plans of decode steps are ours: HDISPATCH_SCHEDULER, 1 if not set. `HdispatchError` likewise."""
    return _flag(SCHEDULER, "plan decode steps in one short loop", "vLLM's own scheduler")


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
    """`switch.load_bundle`, reported in vLLM's log."""
    switch.load_bundle(device, logger)
