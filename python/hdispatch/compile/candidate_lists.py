"""The configs that a kernel's author and its DSL think worth measuring, asked in a process that believes in the target GPU.

A kernel's module may have `candidates(sizes, variant)`, a hand-written list. A Helion kernel also has a config space of its
own, made of fragments: its default, the seeds that its compiler proposes, and the neighbours of both along the fragments.

Speaks JSON like worker.py: a line with `Setup`, then a request per line, each answered by `{"configs": [...]}`, a list of
configs or null for each point of the request, or by `{"error": message}`. Null: the list does not know such sizes.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import BuildError
from . import pool
from . import target as targets
from .build_unit import HINT, load_spec
from .target import GpuTarget
from .worker import Setup

_COMMAND = (sys.executable, "-P", "-c", "from hdispatch.compile.candidate_lists import main; main()")

#: What is moved along Helion's fragments; the others seldom matter and would multiply the candidates.
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


def ask(questions: Sequence[Question], target: GpuTarget) -> list[list[list[Config] | None]]:
    """For each question, for each of its points: the configs; None where the kernel's list does not know such sizes.

    BuildError, naming the kernel, where its list or Helion fails.
    """
    setup = Setup(target.to_json(), "", [path for path in sys.path if path])
    lines = setup.to_line() + "".join(json.dumps(asdict(question)) + "\n" for question in questions)
    with tempfile.TemporaryDirectory(prefix="hdispatch-space-") as scratch:
        environment = pool.environment(Path(scratch), target)
        done = subprocess.run(_COMMAND, input=lines, capture_output=True, text=True, env=environment, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    found = []
    for index, question in enumerate(questions):
        name = f"{question.package.rpartition('.')[2]}, {question.backend}"
        if index >= len(answers):
            raise BuildError(f"{name}: the process that lists candidates ended; it said:\n{done.stderr[-4000:]}")
        if "error" in answers[index]:
            raise BuildError(f"{name}: its candidates cannot be listed: {answers[index]['error']}")
        found.append(answers[index]["configs"])
    return found


# ---- in the other process ----


def main() -> None:
    """Answers questions from standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    setup = Setup(**json.loads(sys.stdin.readline()))
    sys.path += [path for path in setup.paths if path not in sys.path]
    targets.install(targets.GpuTarget(**setup.target))
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"configs": _answer(Question(**json.loads(line)))}
        except Exception as error:  # a kernel's list or a DSL may raise anything; the parent process says whose it was
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(question: Question) -> list[list[Config] | None]:
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
    """The hand-written list; empty if there is none, None if it wants a size that the point leaves out."""
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
    trace = importlib.import_module(f"{__package__}.trace")
    spec = load_spec(question.package)
    maker = trace.CallMaker(spec, spec.variant(question.variant), shape)
    config_spec = module.KERNEL._bind_isolated(maker.symbolic(HINT, floats=False).args).config_spec
    space = generation.ConfigGeneration(config_spec)
    seeds = [config_spec.default_config(), *(config for _, config in space.seed_flat_config_pairs())]
    found = [dict(seed) for seed in seeds]
    for seed in seeds if question.radius else ():
        for moved in space.coordinate_neighbor_projections(space.flatten(seed), radius=question.radius):
            if moved.outcome == "candidate" and moved.key in MOVED:
                found.append(dict(moved.config))
    unique = {json.dumps(config, sort_keys=True): config for config in found}
    return list(unique.values())
