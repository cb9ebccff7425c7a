"""The process that measures: it opens the GPU and a bundle, and measures cells when told to.

Speaks JSON, an object per line. First what `Setup` holds, answered by `{"gpu": name}`; then `{"cell": index, "skip": records}`,
answered by `{"at": record}` before each step of a candidate, so that who waits knows whose it is, and by `{"found": timings}`
at last. `{"error": text}` ends it. Neither the build wing nor a DSL is imported.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from .. import child, registry
from ..errors import HdispatchError
from ..manifest import Manifest
from .candidates import read_candidates
from .cell_bench import Bench
from .device import Device, open_device
from .measure_process import Setup


def main(opened: Callable[[Path, Manifest, int], Device] = open_device) -> None:
    """Measure until standard input ends. `opened`: the device for a bundle; tests have another."""
    answers = child.begin()
    try:
        setup = Setup(**json.loads(sys.stdin.readline()))
        for each in setup.kernels:
            registry.define_package(each)
        bundle = read_candidates(setup.bundle)
        device = opened(Path(setup.bundle), bundle["manifest"], setup.device)
        order = random.Random(setup.seed)
        bench = Bench(bundle, device, order, setup.versions, lambda record: child.answer(answers, {"at": record}))
        child.answer(answers, {"gpu": device.describe()})
        for line in sys.stdin:
            request = json.loads(line)
            cell = bundle["candidates"]["cells"][request["cell"]]
            child.answer(answers, {"found": bench.measure(cell, set(request["skip"]), setup.seed)})
    except HdispatchError as error:
        child.answer(answers, {"error": str(error)})
    except Exception as error:  # out of memory, a reference that fails: no candidate's fault, and the parent says it
        child.answer(answers, {"error": f"{type(error).__name__}: {error}"})
