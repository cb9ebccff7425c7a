"""The configs to measure that a kernel and its DSL propose, asked in a process that simulates the target GPU.

A kernel's module may have `candidates(sizes, variant)`, a hand-written list. A Helion kernel also has a config space of its
own, made of fragments: its default, the seeds that its compiler proposes, and the neighbours of both along the fragments.

A worker process (worker.py) answers: for each point of a question a list of configs, or null where the list does not know
such sizes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from . import pool
from .build_unit import common_m, load_spec

#: Options that are varied among Helion's fragments. The others seldom matter and would multiply the candidates.
MOVED = ("block_sizes", "reduction_loops", "loop_orders", "l2_groupings", "num_warps", "num_stages", "pid_type")

Config = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Which configs to measure for a variant of an op's kernel at some points: sizes such as {"M": 16, "K": 4096}.

    points   sizes that are fixed, with M; one that is left out is to be served whatever it is
    full     of each point all sizes, for a list that does not know fewer; null: then it has none
    shapes   of each point the sizes that are compiled in, of which Helion makes its space
    radius   how many steps along a fragment Helion's neighbours may be; 0: no neighbours, less: nothing from Helion
    """

    package: str
    backend: str
    variant: str
    points: list[dict[str, int]]
    full: list[dict[str, int] | None]
    shapes: list[dict[str, int]]
    radius: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"the candidates of {self.package.rpartition('.')[2]}, {self.backend}"


def ask(questions: Sequence[Question], workers: pool.Pool) -> list[list[list[Config] | None]]:
    """For each question, for each of its points: the configs; None where the kernel's list does not know such sizes.

    BuildError, naming the kernel, where its list or Helion fails.
    """
    return [workers.ask(question.name, {"question": asdict(question)})["configs"] for question in questions]


# ---- in the worker process ----


def answer(question: Question) -> list[list[Config] | None]:
    """For each point of a question the configs, or None: what `ask` returns."""
    module = importlib.import_module(f"{question.package}.{question.backend}")
    spaces: dict[str, list[Config]] = {}
    found: list[list[Config] | None] = []
    for point, full, shape in zip(question.points, question.full, question.shapes, strict=True):
        configs = _listed(question, module, point)
        if configs is None and full is not None:
            configs = _listed(question, module, full)
        if question.backend == "helion" and question.radius >= 0 and full is not None:
            key = json.dumps(shape, sort_keys=True)
            if key not in spaces:
                spaces[key] = _helion_space(question, module, shape)
            configs = [*(configs or []), *spaces[key]]
        found.append(configs)
    return found


def _listed(question: Question, module: ModuleType, point: Mapping[str, int]) -> list[Config] | None:
    """The hand-written list; empty without one, None if it needs a size that the point leaves open."""
    listed = getattr(module, "candidates", None)
    if listed is None:
        return []
    spec = load_spec(question.package)
    try:
        return [dict(config) for config in listed(dict(point), spec.variant(question.variant))]
    except KeyError as error:
        if error.args and error.args[0] in spec.symbols() and error.args[0] not in point:
            return None
        raise


def _helion_space(question: Question, module: ModuleType, shape: Mapping[str, int]) -> list[Config]:
    """Helion's default, its compiler's seeds, and their neighbours along the fragments in MOVED.

    Uses Helion's private `_bind_isolated`, like helion_backend.py, and its autotuner's ConfigGeneration.
    """
    generation = importlib.import_module("helion.autotuner.config_generation")
    calls = importlib.import_module(f"{__package__}.call_maker")
    spec = load_spec(question.package)
    backend = importlib.import_module(f"{__package__}.helion_backend")
    maker = calls.CallMaker(spec, spec.variant(question.variant), shape, allocates=backend.allocates(module, spec))
    args = backend.arguments(module, module.KERNEL, maker, common_m(spec))
    config_spec = module.KERNEL._bind_isolated(args).config_spec
    space = generation.ConfigGeneration(config_spec)
    seeds = [config_spec.default_config(), *(config for _, config in space.seed_flat_config_pairs())]
    found = [dict(seed) for seed in seeds]
    for seed in seeds if question.radius else ():
        for moved in space.coordinate_neighbor_projections(space.flatten(seed), radius=question.radius):
            if moved.outcome == "candidate" and moved.key in MOVED:
                found.append(dict(moved.config))
    unique = {json.dumps(config, sort_keys=True): config for config in found}
    return list(unique.values())
