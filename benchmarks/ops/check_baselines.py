"""Whether the baselines of torch.compile are fair: the functions derived from the ops' references beside those of a file.

    python -m benchmarks.ops.check_baselines FILE.py [--ops A,B] [--models 8B] [--ms 1,16,256,2048,8192] [--percent 5]

FILE.py has FUNCTIONS: by name of the op, a function of the op's arguments that returns what the op writes. Each is timed
under torch.compile in CUDA graphs, in the same rounds as the derived one and as the reference in place. Needs a GPU, and no
bundle. Exit 1 if an op's functions are faster than the derived one by more than --percent (geometric mean), or one fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from hdispatch import registry
from hdispatch.cli import numbers
from hdispatch.cli.text import table
from hdispatch.errors import HdispatchError

from .compiled import OPS, Function, binder, compile_function, compile_op
from .grid import cells, model_names
from .result import cell_name, geomean
from .timing import Failure, Timing, measure, require_gpu

PATHS = ("derived", "in place", "given")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and answer with the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.py", type=Path)
    parser.add_argument("--ops", metavar="A,B", type=numbers.words, help="default: all of the file")
    parser.add_argument("--models", metavar="A,B", type=numbers.words, default=("8B",), help="default: 8B")
    parser.add_argument("--ms", metavar="M,M", type=numbers.sizes, default=(1, 16, 256, 2048, 8192))
    parser.add_argument("--percent", type=numbers.real, default=5.0, help="how much faster a function may be (default: 5)")
    given = parser.parse_args(argv)
    functions = read(given.file)
    timings: list[Timing] = []
    failures: list[Failure] = []
    device, order = require_gpu(), random.Random(0)
    specs = [registry.spec(op) for op in given.ops or functions if op in OPS]
    for cell in cells(specs, given.ms, ("warm",), model_names(given.models), ("default",)):
        op = cell["op"]
        compiled = compile_op(op), compile_function(registry.spec(op).reference), compile_function(functions[op])
        found = measure(cell, dict(zip(PATHS, map(binder, compiled), strict=True)), device, 11, order)
        timings += found.timings
        failures += found.failures
    slower = report(timings, given.percent)
    for each in failures:
        print(f"{each['op']}, {each['path']}, {cell_name(each)}: {each['reason']}")
    return int(bool(slower or failures))


def read(file: Path) -> dict[str, Function]:
    """The file's FUNCTIONS."""
    spec = importlib.util.spec_from_file_location("given_baselines", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise HdispatchError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions: dict[str, Function] = module.FUNCTIONS
    return functions


def report(timings: Sequence[Timing], percent: float) -> list[str]:
    """Print µs by cell and path, and each op's mean; the ops whose derived function is too slow."""
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for each in timings:
        figures.setdefault((each["op"], cell_name(each)), {})[each["path"]] = each["median_us"]
    whole = {cell: paths for cell, paths in figures.items() if len(paths) == len(PATHS)}
    lines = [
        [op, cell, *(f"{paths[path]:.2f}" for path in PATHS), f"{paths['given'] / paths['derived']:.3f}"]
        for (op, cell), paths in whole.items()
    ]
    print(table(("op", "cell", *(f"{path}, µs" for path in PATHS), "given / derived"), lines, left=2))
    slower = []
    for op in dict.fromkeys(op for op, _ in whole):
        mean = geomean([paths["given"] / paths["derived"] for (name, _), paths in whole.items() if name == op])
        if 1 / mean > 1 + percent / 100:
            slower.append(op)
            print(f"{op}: the given function is {1 / mean:.3f} times as fast: faster than the derived one")
    return slower


if __name__ == "__main__":
    sys.exit(main())
