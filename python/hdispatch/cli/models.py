"""`--models A,B` and `--tensor-parallel N`: the sizes that models call the ops with, for `build` and the steps of `tune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..errors import HdispatchError
from ..models import Calls, calls_of, find
from ..opspec import OpSpec
from . import numbers
from .text import split


def add_arguments(parser: argparse.ArgumentParser, what: str = "the sizes that these models call the ops with") -> None:
    """Declare the options; `what` the models stand for."""
    parser.add_argument("--models", metavar="A,B", help=f"{what}: Qwen3-8B, …, or a config.json, or a model's folder")
    parser.add_argument(
        "--tensor-parallel", metavar="N", type=numbers.whole, default=1, help="of models: one of N GPUs' part (default: 1)"
    )


def chosen_calls(arguments: argparse.Namespace) -> Callable[[OpSpec], Calls] | None:
    """How the models of --models call an op; None without the option, or where a subcommand does not have it."""
    words = split(getattr(arguments, "models", None))
    if words is None:
        return None
    if not words:
        raise HdispatchError("--models is empty; it takes Qwen3-8B,…, or a config.json")
    found = find(words, arguments.tensor_parallel)
    return lambda spec: calls_of(spec, found)
