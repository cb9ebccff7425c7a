"""Options that the steps of `hdispatch tune` share, and what they stand for: which points, which models, which GPUs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import HdispatchError
from ..opspec import OpSpec
from . import kernels, models, numbers
from .build import build_wing, parse_shapes
from .text import split

if TYPE_CHECKING:
    from ..tune.farm import Farm
    from ..tune.points import Scope


def add_scope(parser: argparse.ArgumentParser) -> None:
    """Declare which ops, variants, sizes and buckets."""
    parser.add_argument("--ops", metavar="A,B", help="ops (default: all; with --kernels those of it)")
    kernels.add_argument(parser)
    parser.add_argument("--variants", metavar="V,W", help="variants to measure (default: the typical one of each op)")
    parser.add_argument("--shapes", metavar="K=4096,…", help="only these sizes; every op must have one of them (default: all)")
    parser.add_argument(
        "--buckets",
        metavar="1,16,…",
        help="only the buckets of M with these upper edges; every op must have them (default: all)",
    )


def add_farm(parser: argparse.ArgumentParser, what: str = "measure on the GPUs") -> None:
    """Declare --gpus and --ray. `what` is done on the cluster."""
    parser.add_argument(
        "--gpus",
        metavar="N",
        type=numbers.whole,
        help="GPUs to measure on at once (default: one; with --ray all of the cluster)",
    )
    add_ray(parser, what)


def add_ray(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare --ray. `what` is done on the cluster."""
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="",
        help=f"{what} of a Ray cluster: at ADDRESS, else $RAY_ADDRESS, else one that runs here, else a new one",
    )


def scope_of(arguments: argparse.Namespace) -> Scope:
    """The points that --shapes, --variants and --buckets, or --models, leave; and where more configs come from."""
    with build_wing():
        from ..tune.points import Scope

    variants, edges = split(arguments.variants), split(arguments.buckets)
    shapes = parse_shapes(arguments.shapes) if arguments.shapes else None
    calls = models.chosen_calls(arguments)
    if calls is not None and (shapes or variants):
        raise HdispatchError("--models says which sizes and variants are meant: leave out --shapes and --variants")
    return Scope(
        variants=_chosen_variants(variants) if variants else None,
        shapes=_chosen_shapes(shapes) if shapes else None,
        buckets=chosen_buckets(edges) if edges else None,
        more=tuple(getattr(arguments, "configs", ())),
        radius=getattr(arguments, "radius", -1),
        spread=getattr(arguments, "spread", None),
        calls=None if calls is None else lambda spec: calls(spec).rows,
        backends=_chosen_backends(getattr(arguments, "backends", None)),
        whole=getattr(arguments, "whole", False),
    )


def ops_of(arguments: argparse.Namespace) -> tuple[list[str] | None, list[str]]:
    """The ops of --ops, of which --models leaves those that its models call; and a line of text for each call without a row."""
    with build_wing():
        from ..compile import op_package
    ops, calls = kernels.chosen_ops(arguments), models.chosen_calls(arguments)
    if calls is None:
        return ops, []
    found = {name: calls(package.spec) for name, package in op_package.find(ops, kernels.given(arguments)).items()}
    if not any(each.rows for each in found.values()):
        raise HdispatchError(f"the models of --models call none of {', '.join(found)}")
    return [name for name, each in found.items() if each.rows], [note for each in found.values() for note in each.notes]


def _chosen_backends(given: str | None) -> tuple[str, ...] | None:
    with build_wing():
        from ..compile.versions import PACKAGES
    names = split(given)
    if names and (unknown := [name for name in names if name not in PACKAGES]):
        raise HdispatchError(f"--backends has {unknown[0]!r}; there are {', '.join(PACKAGES)}")
    return tuple(names) if names else None


def _chosen_variants(names: Sequence[str]) -> Callable[[OpSpec], Iterable[str]]:
    def choose(spec: OpSpec) -> list[str]:
        has = [variant.name for variant in spec.variants()]
        return [name for name in names if name in has] or [spec.typical_variant().name]

    return choose


def _chosen_shapes(shapes: Sequence[dict[str, int]]) -> Callable[[OpSpec], Iterable[dict[str, int]]]:
    def choose(spec: OpSpec) -> list[dict[str, int]]:
        chosen = [shape for shape in shapes if shape in spec.shapes]
        if not chosen:
            raise HdispatchError(f"--shapes has none of {spec.name}, which has {list(spec.shapes)}")
        return chosen

    return choose


def chosen_buckets(edges: Sequence[str]) -> Callable[[OpSpec], Iterable[int]]:
    """The buckets with these upper edges, of any op that has them all."""

    def choose(spec: OpSpec) -> list[int]:
        known = [str(edge) for edge in spec.ladder]
        if unknown := [edge for edge in edges if edge not in known]:
            raise HdispatchError(f"--buckets: {unknown[0]!r} is no upper edge of {spec.name}, which has {list(spec.ladder)}")
        return [bucket for edge in edges for bucket in spec.ladders.of_m(known.index(edge))]

    return choose


def farm_of(arguments: argparse.Namespace) -> Farm:
    """The GPUs that --ray and --gpus ask for."""
    if arguments.ray is None:
        from ..tune.farm import LocalFarm

        return LocalFarm(arguments.gpus)
    with ray_wing():
        from ..tune.farm_ray import RayFarm
    return RayFarm(arguments.ray or None, arguments.gpus)


@contextmanager
def ray_wing() -> Iterator[None]:
    """For imports that need ray: an `ImportError` inside says how to install it."""
    try:
        yield
    except ImportError as error:
        raise HdispatchError(f"--ray needs ray: {error}; install it: pip install 'hdispatch[ray]'") from error
