"""`--kernels DIR|PACKAGE`: ops outside of hdispatch, for every subcommand that takes ops."""

from __future__ import annotations

import argparse
from pathlib import Path

from .text import split

HELP = (
    "ops outside of hdispatch: a folder or a dotted package, of an op (with spec.py) or of several; may be given again. "
    "Installed distributions name theirs in the entry points hdispatch.kernels, and need no option"
)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """Declare the option."""
    parser.add_argument("--kernels", metavar="DIR|PACKAGE", action="append", default=[], help=HELP)


def given(arguments: argparse.Namespace) -> list[str]:
    """What the option names; folders as absolute paths, so that other processes find them."""
    return [str(Path(each).resolve()) if Path(each).is_dir() else each for each in arguments.kernels]


def chosen_ops(arguments: argparse.Namespace) -> list[str] | None:
    """Names of ops: those of --ops, else those of --kernels, else None. Defines the ops of --kernels."""
    names = define(arguments)
    return split(arguments.ops) if arguments.ops is not None or not names else names


def define(arguments: argparse.Namespace) -> list[str]:
    """Define the ops of --kernels in this process and return their names."""
    from .. import registry

    return list(dict.fromkeys(name for each in given(arguments) for name in registry.define_package(each)))
