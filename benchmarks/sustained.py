"""Products that run without a pause, where a card's power is what limits them: time, power and clock of candidates and peers.

    python -m benchmarks.sustained CANDIDATES MxKxN[,MxKxN…] [--vllm-ops LIBRARY] [--deep-gemm FOLDER] [--seconds 0.25]
        [--rounds 2] [--json FILE] [--once]

CANDIDATES is a folder that `hdispatch tune candidates` made for scaled_mm or scaled_mm_blockwise, or both; all its cells of
these sizes are measured. Peers are cuBLAS, with vLLM's library CUTLASS, and with its package DeepGEMM. Each candidate is
checked first. In every round all run in random order, graphs in a row for as many seconds; printed are medians: µs of a
launch, its ratio to the best one's, TFLOPS, W and MHz. The power is a difference of NVML's counter of energy, which goes in
steps of some 0.1 s: of one line it may be off by a third, the clock is not.

With --once nothing is timed: each is named and called once, in a range of NVTX, for a profiler:

    ncu --nvtx --nvtx-include once/ --clock-control none --metrics sm__cycles_elapsed.max --csv python3 -m …
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hdispatch import _C, registry
from hdispatch.errors import HdispatchError
from hdispatch.manifest import artifacts_of, ladders_of
from hdispatch.runtime import strict
from hdispatch.testing.device_timer import Replay
from hdispatch.tune.candidates import CandidateBundle, Cell, read_candidates
from hdispatch.tune.cell_arguments import CellArguments
from hdispatch.tune.device import Device, OneRow, open_device

from benchmarks.ops import peers
from benchmarks.ops.deep_gemm import DeepGemm
from benchmarks.ops.timing import Binder
from benchmarks.verdict import require_folder

#: µs of launches that a graph has, and graphs that run before a sample, so that the clock is that of this kernel.
REPLAY_US, SETTLING = 10_000.0, 5
#: NVML's number of the clock of SMs.
NVML_CLOCK_SM = 1
#: What --once launches within.
RANGE = "once"

#: A name and what is called in turn.
Kernel = tuple[str, Sequence[Callable[[], object]]]


class Sample(NamedTuple):
    """What one kernel did in a round: µs of a launch, W, MHz."""

    us: float
    watts: float
    mhz: float


class Card:
    """The first GPU's counter of energy and clock, from NVML."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libnvidia-ml.so.1")
        self.handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", 0, ctypes.byref(self.handle))

    def _call(self, name: str, *args: Any) -> None:
        if status := getattr(self.library, name)(*args):
            raise RuntimeError(f"{name} failed with {status}; NVML's nvmlReturn_t says why")

    def joules(self) -> float:
        """Since the driver was loaded."""
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self.handle, ctypes.byref(value))
        return value.value / 1e3

    def mhz(self) -> int:
        """Of the SMs, now."""
        value = ctypes.c_uint()
        self._call("nvmlDeviceGetClockInfo", self.handle, NVML_CLOCK_SM, ctypes.byref(value))
        return value.value


def kernels(bundle: CandidateBundle, cell: Cell, device: Device, binders: Mapping[str, Binder]) -> Iterator[Kernel]:
    """Each candidate of a cell, published and found right, by its config, and each peer."""
    manifest, op = bundle["manifest"], registry.get(cell["op"])
    ladders = ladders_of(manifest["ops"][cell["op"]])
    subject = CellArguments(cell, device, 0)
    for index in cell["records"]:
        record = manifest["records"][index]
        files = {name: bundle["contents"][name] for name in artifacts_of(record)}
        device.publish(OneRow(op, ladders, cell["variant"], cell["K"], cell["N"], cell["bucket"], record, files))
        subject.check()
        yield json.dumps(record["config"]), subject.calls()
    for name, bind in binders.items():
        bound = [bind(cell["op"], arguments) for arguments in subject.sets]
        if None not in bound:
            yield name, [_call(*each) for each in bound if each]


def _call(function: Callable[..., object], arguments: tuple[Any, ...]) -> Callable[[], object]:
    return lambda: function(*arguments)


def replays(found: Iterator[Kernel], device: Device) -> dict[str, Replay]:
    """A graph of each, all of as many launches."""
    launches, made = 0, {}
    for name, calls in found:
        launches = launches or max(1, int(REPLAY_US / device.estimate(calls)))
        made[name] = Replay(calls, launches)
    return made


def call_once(found: Iterator[Kernel]) -> None:
    """Prints each name and makes its first call, in a range for profilers."""
    for name, calls in found:
        print(name, flush=True)
        with torch.cuda.nvtx.range(RANGE):
            calls[0]()
        torch.cuda.synchronize()


def sample(run: Replay, card: Card, seconds: float) -> Sample:
    """Runs graphs in a row for as many seconds."""
    run.time(SETTLING)
    times, clocks = [], []
    joules, start = card.joules(), time.monotonic()
    while (passed := time.monotonic() - start) < seconds:
        times.append(run.time(2))
        clocks.append(card.mhz())
    return Sample(statistics.median(times), (card.joules() - joules) / passed, statistics.median(clocks))


def measure(runs: dict[str, Replay], card: Card, seconds: float, rounds: int) -> dict[str, list[Sample]]:
    """All of them in random order, round by round."""
    found: dict[str, list[Sample]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            found[name].append(sample(runs[name], card, seconds))
    return found


def title(cell: Cell) -> str:
    """What is measured."""
    return f"{cell['op']} {cell['variant']} M = {cell['M']}, K = {cell['K']}, N = {cell['N']}"


def show(cell: Cell, found: dict[str, list[Sample]]) -> None:
    """The table of a cell, the fastest first."""
    m, k, n = cell["M"], cell["K"], cell["N"]
    print(title(cell))
    medians = {name: Sample(*map(statistics.median, zip(*samples, strict=True))) for name, samples in found.items()}
    best = min(each.us for each in medians.values())
    for name, (us, watts, mhz) in sorted(medians.items(), key=lambda each: each[1].us):
        print(f"{us:10.2f} µs {us / best:6.3f} {2 * m * n * k / us / 1e6:6.0f} TFLOPS {watts:5.0f} W {mhz:5.0f} MHz  {name}")


def sizes(text: str) -> list[tuple[int, int, int]]:
    """`MxKxN,…` as numbers."""
    found = [tuple(map(int, cell.split("x"))) for cell in text.split(",")]
    if any(len(each) != 3 for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}; a cell is MxKxN")
    return [(m, k, n) for m, k, n in found]


def cells_of(folder: Path, bundle: CandidateBundle, wanted: Sequence[tuple[int, int, int]]) -> list[Cell]:
    """The cells of each size, of all ops and variants. HdispatchError for a size that has none."""
    by_size: dict[tuple[int, int, int], list[Cell]] = {}
    for cell in bundle["candidates"]["cells"]:
        by_size.setdefault((cell["M"], cell["K"], cell["N"]), []).append(cell)
    if missing := [size for size in wanted if size not in by_size]:
        raise HdispatchError(f"{folder} has no cell of M, K, N = {missing}; it has {sorted(by_size)}")
    return [cell for size in wanted for cell in by_size[size]]


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line."""
    parser.add_argument("candidates", type=Path)
    parser.add_argument("cells", type=sizes, help="MxKxN, with commas")
    parser.add_argument("--vllm-ops", type=Path, help="the library behind torch.ops._C")
    parser.add_argument("--deep-gemm", type=Path, help="the package that vLLM ships, vllm/third_party/deep_gemm")
    parser.add_argument("--seconds", type=float, default=0.25, help="of each kernel in a round (default: 0.25)")
    parser.add_argument("--rounds", type=int, default=2)
    results = parser.add_mutually_exclusive_group()
    results.add_argument("--json", type=Path, help="all samples")
    results.add_argument("--once", action="store_true", help="call each once, for a profiler")
    given = parser.parse_args()
    if given.seconds <= 0 or given.rounds < 1:
        parser.error(f"{given.seconds} seconds in {given.rounds} rounds; there must be more than 0, in 1 or more")
    return given


def run(given: argparse.Namespace) -> None:
    """Measures, or calls, all cells."""
    require_folder(given.json)
    bundle = read_candidates(given.candidates)
    cells = cells_of(given.candidates, bundle, given.cells)
    if not torch.cuda.is_available():
        raise HdispatchError(f"there is no GPU here ({_C.driver_missing() or 'torch sees none'}); take the candidates to one")
    binders: dict[str, Binder] = {"cuBLAS": peers.bind_torch_scaled_mm}
    if given.vllm_ops:
        peers.load_vllm_ops(given.vllm_ops)
        binders["CUTLASS"] = peers.bind_vllm
    if given.deep_gemm:
        binders["DeepGEMM"] = DeepGemm(given.deep_gemm).bind
    device, card, results = open_device(given.candidates, bundle["manifest"], 0), Card(), []
    for cell in cells:
        with strict():
            ready = kernels(bundle, cell, device, binders)
            if given.once:
                print(title(cell))
                call_once(ready)
                continue
            runs = replays(ready, device)
            found = measure(runs, card, given.seconds, given.rounds)
        show(cell, found)
        head = {name: cell[name] for name in ("op", "variant", "M", "K", "N")}
        results += [{**head, "name": name, "samples": each} for name, each in found.items()]
        for each in runs.values():
            each.close()
    if given.json:
        given.json.write_text(json.dumps(results) + "\n")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    given = parsed(parser)
    try:
        run(given)
    except HdispatchError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
