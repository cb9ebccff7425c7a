"""The paths of the dispatch benchmark: floors, hdispatch's doors, peers; each is made on demand or says why it cannot run."""

from __future__ import annotations

import bisect
import importlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import _C, functions, runtime
from ..errors import HdispatchError, first_line
from ..opspec import TensorArg, Variant
from ..registry import get as get_op
from ..registry import spec as spec_of
from ..testing.host_timer import WARM_CALLS, Batch, call_batch
from .workload import CYCLE, M_KINDS, Arguments, MakeBatch, MKind, Workload, unseen_pool

CHAIN = 360
#: Helion takes about a millisecond for an M that it has not seen.
SLOW_CALLS = 20

PICKS = 80_000
PICK_HIDDEN = tuple(1024 * i for i in range(1, 21))
PICK_EDGES = tuple(2**i for i in range(15))
PICK_SHAPES = ((1, 1024), (3, 4096), (16, 4096), (100, 5120), (500, 2048), (1000, 8192), (4096, 12288), (8000, 20480))
PROBE_ROWS, PROBES = 10_000, 500_000
#: An op with three tensors, and sizes that are not in the table of picks.
FUNCTION_OP = "dynamic_per_token_scaled_fp8_quant"
FUNCTION_SIZES = {"M": 16, "K": 512}
FUNCTION_CALLS = 100_000
#: Its rows launch through a function in the bundle's library.
HOST_OP = "ll_gemm_bf16"


class Unavailable(HdispatchError):
    """A path cannot run here; the text says why."""


@dataclass(frozen=True)
class Case:
    """A path with one pattern of M, ready to be timed. `launches`: its time is compared with the floor's."""

    path: str
    op: str
    m: MKind
    batch: Batch
    launches: bool = False


@dataclass
class Subject:
    """The op that all paths call and its arguments: `cpu` and `gpu` hold the same ones.

    no_gpu       why `gpu` is None
    no_bundle    by driver, "null" or "cuda": why no bundle is loaded for it
    config       of the record that serves the fixed M, with its backend
    """

    op: _C.Op
    cpu: Workload
    gpu: Workload | None
    no_gpu: str
    calls: int
    rounds: int
    order: random.Random
    vllm_ops: Path | None = None
    no_bundle: dict[str, str] = field(default_factory=dict)
    backend: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def on_gpu(self) -> Workload:
        """The arguments on the GPU."""
        if self.gpu is None:
            raise Unavailable(self.no_gpu)
        return self.gpu

    def served(self, driver: str) -> Workload:
        """The arguments on the device that this driver serves, with a bundle loaded for it."""
        workload = self.cpu if driver == "null" else self.on_gpu
        if driver in self.no_bundle:
            raise Unavailable(self.no_bundle[driver])
        return workload


Maker = Callable[[Subject], Iterator[Case]]


def calling(
    subject: Subject,
    path: str,
    workload: Workload,
    call: Callable[..., object],
    *,
    select: Callable[[Arguments], Arguments] | None = None,
    op: str = "",
    slow: bool = False,
    launches: bool = True,
    kinds: Sequence[MKind] = M_KINDS,
) -> Iterator[Case]:
    """One case for each way of M (`kinds`) of a path that takes the op's arguments, or what `select` makes of them."""
    select = select or tuple
    synchronize = synchronizer(workload)
    for m in CYCLE:  # both classes of M that compilers tell apart: multiples of 16, and others
        call(*select(workload.at(m)))
    warm = [select(workload.at(workload.m))] * WARM_CALLS
    for kind in kinds:
        calls = SLOW_CALLS if slow and kind == "unseen" else subject.calls
        if kind == "unseen":  # every round, and the rehearsal, needs Ms of its own
            calls = max(1, min(calls, len(unseen_pool(workload.m, workload.largest)) // (subject.rounds + 1)))
        make = workload.maker(kind, calls, subject.order)
        yield Case(path, op or subject.op.name, kind, call_batch(call, _selected(make, select), warm, synchronize), launches)


def _selected(make: MakeBatch, select: Callable[[Arguments], Arguments]) -> MakeBatch:
    return lambda: [select(arguments) for arguments in make()]


def synchronizer(workload: Workload) -> Callable[[], object]:
    """Waits for the workload's device."""
    if workload.device.type != "cuda":
        return lambda: None
    return lambda: torch.cuda.synchronize(workload.device)


# ---- floors ----


def python_call(subject: Subject) -> Iterator[Case]:
    """An empty Python function with as many parameters as the op."""
    names = ", ".join(f"a{i}" for i in range(len(subject.cpu.whole)))
    yield from calling(subject, "python-call", subject.cpu, eval(f"lambda {names}: None"), launches=False)


def bare_driver(subject: Subject) -> Iterator[Case]:
    """The bare driver call in a C loop, without launch attributes: the floor."""
    yield _bare(subject, "cuLaunchKernelEx", pdl=False)


def bare_driver_pdl(subject: Subject) -> Iterator[Case]:
    """The same with the launch attributes of the bundle, PDL among them."""
    yield _bare(subject, "cuLaunchKernelEx-pdl", pdl=True)


def _bare(subject: Subject, path: str, *, pdl: bool) -> Case:
    workload = subject.served("cuda")
    synchronize = synchronizer(workload)
    arguments = workload.at(workload.m)

    def run() -> float:
        _C.bench_launch_ns(subject.op, arguments, WARM_CALLS, pdl)
        synchronize()
        ns: float = _C.bench_launch_ns(subject.op, arguments, subject.calls, pdl)
        synchronize()
        return ns

    return Case(path, subject.op.name, "fixed", run, launches=True)


# ---- hdispatch ----


def null_driver(subject: Subject) -> Iterator[Case]:
    """`hdispatch.ops` with everything but the driver call, on CPU tensors."""
    yield from calling(subject, "null-driver", subject.served("null"), subject.op, launches=False)


def host_function(subject: Subject) -> Iterator[Case]:
    """`hdispatch.ops` of an op whose kernels are launched by a host function (CuteDSL's): ll_gemm_bf16, 1 <= M <= 16."""
    subject.served("cuda")
    bundle = next(each for each in runtime.loaded() if each.device != -1)
    rows = [row for row in bundle.manifest["rows"] if row["op"] == HOST_OP and row["K"] and row["N"]]
    if not rows:
        raise Unavailable(f"the bundle has no row of {HOST_OP}")
    spec, row = spec_of(HOST_OP), rows[0]
    shape, m = {"K": row["K"], "N": row["N"]}, min(subject.on_gpu.m, max(CYCLE))
    workload = Workload(spec, spec.variant(row["variant"]), shape, m, subject.on_gpu.device, spec.ladder[-1])
    yield from calling(subject, "host-function", workload, get_op(HOST_OP), op=HOST_OP, kinds=("fixed", "cycling"))


def torch_null_driver(subject: Subject) -> Iterator[Case]:
    """The same as `torch.ops.hdispatch.<op>`."""
    yield from calling(subject, "torch.ops.hdispatch-null", subject.served("null"), _torch_op(subject), launches=False)


def torch_default_null_driver(subject: Subject) -> Iterator[Case]:
    """The same as `torch.ops.hdispatch.<op>.default`, which parses the arguments against the schema."""
    call = _torch_op(subject).default
    yield from calling(subject, "torch.ops.hdispatch.default-null", subject.served("null"), call, launches=False)


def ops(subject: Subject) -> Iterator[Case]:
    """`hdispatch.ops` as shipped."""
    yield from calling(subject, "hdispatch.ops", subject.served("cuda"), subject.op)


def ops_without_pdl(subject: Subject) -> Iterator[Case]:
    """`hdispatch.ops` with a bundle loaded with pdl=False."""
    yield from calling(subject, "hdispatch.ops-nopdl", subject.served("cuda"), subject.op)


def torch_ops(subject: Subject) -> Iterator[Case]:
    """`torch.ops.hdispatch.<op>`."""
    yield from calling(subject, "torch.ops.hdispatch", subject.served("cuda"), _torch_op(subject))


def torch_default(subject: Subject) -> Iterator[Case]:
    """`torch.ops.hdispatch.<op>.default`: through torch's own argument parser and dispatcher."""
    yield from calling(subject, "torch.ops.hdispatch.default", subject.served("cuda"), _torch_op(subject).default)


def _torch_op(subject: Subject) -> Any:
    return getattr(torch.ops.hdispatch, subject.op.name)


# ---- peers ----


def triton_jit(subject: Subject) -> Iterator[Case]:
    """A Triton kernel with five pointers, called as Triton users do."""
    workload = subject.on_gpu
    module = _import("triton", f"{__package__}.triton_kernel")
    launch = module.launcher(workload.largest, workload.device)
    position = _m_position(workload)
    yield from calling(subject, "triton", workload, launch, select=lambda a: (a[position].shape[0],), op="five_pointers")


def helion_direct(subject: Subject) -> Iterator[Case]:
    """The Helion kernel and config that the bundle serves, called as Helion users do."""
    workload = subject.served("cuda")
    yield from calling(subject, "helion", workload, _helion_kernel(subject, None), slow=True)


def helion_torch_op(subject: Subject) -> Iterator[Case]:
    """The same behind a torch op, with a key function that finds the bucket of M: vLLM's integration."""
    workload = subject.served("cuda")
    spec, position = workload.spec, _m_position(workload)

    def key(*args: Any) -> tuple[int, ...]:
        rows, *others = args[position].shape
        return (bisect.bisect_left(spec.ladder, rows), *others)

    kernel = _helion_kernel(subject, key)
    library = torch.library.Library("hdispatch_bench", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(spec.schema())  # type: ignore[no-untyped-call]
    library.impl(spec.name, kernel, "CUDA")  # type: ignore[no-untyped-call]
    call = getattr(torch.ops.hdispatch_bench, spec.name)
    for edge in spec.ladder:  # vLLM warms every key up; an M that is unseen afterwards has a known key
        for m in {edge, edge - 1} - {0, 1}:
            if m <= workload.largest:
                call(*workload.at(m))
    for case in calling(subject, "helion-torch-op", workload, call, slow=True):
        yield replace(case, batch=_keeping(case.batch, library))


def _keeping(batch: Batch, library: object) -> Batch:
    """The batch, which keeps the library: its ops are undefined once it is collected."""
    return lambda: (batch(), library)[0]


def _helion_kernel(subject: Subject, key: Callable[..., object] | None) -> Callable[..., object]:
    if subject.backend != "helion":
        raise Unavailable(f"the row that serves M = {subject.cpu.m} is made by {subject.backend or 'nothing'}, not by Helion")
    helion = _import("helion", "helion")
    module = _import("helion", f"hdispatch.kernels.{subject.op.name}.helion")
    kernel: Callable[..., object] = helion.Kernel(
        module.KERNEL.fn, configs=[helion.Config(**subject.config)], settings=module.KERNEL.settings, key=key
    )
    return kernel


def vllm_op(subject: Subject) -> Iterator[Case]:
    """vLLM's own CUDA kernel for the op, which has the same arguments."""
    workload = subject.on_gpu
    if subject.vllm_ops is None:
        raise Unavailable("needs vLLM's compiled ops: --vllm-ops PATH/TO/_C….so")
    try:
        torch.ops.load_library(str(subject.vllm_ops))  # type: ignore[no-untyped-call]
        call = getattr(torch.ops._C, subject.op.name)
    except (OSError, AttributeError) as error:
        raise Unavailable(f"{subject.vllm_ops}: {first_line(error)}") from error
    yield from calling(subject, "torch.ops._C", workload, call)


def cuda_graph(subject: Subject) -> Iterator[Case]:
    """Replaying a CUDA graph of one launch."""
    workload = subject.served("cuda")
    graph = _captured(workload, subject.op, 1)
    calls: list[Arguments] = [()] * subject.calls
    batch = call_batch(graph.replay, lambda: calls, [()] * WARM_CALLS, synchronizer(workload))
    yield Case("cuda-graph", subject.op.name, "fixed", batch, launches=True)


def _captured(workload: Workload, call: Callable[..., object], count: int) -> torch.cuda.CUDAGraph:
    arguments = workload.at(workload.m)
    call(*arguments)
    torch.cuda.synchronize(workload.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call(*arguments)
    return graph


# ---- chains: time on the GPU and the host together ----


def chain_ops(subject: Subject) -> Iterator[Case]:
    """A chain of launches through `hdispatch.ops`, from the first to the end of the last."""
    workload = subject.served("cuda")
    yield _chain("chain-hdispatch", subject.op.name, workload, _repeated(subject.op, workload.at(workload.m)))


def chain_torch_add(subject: Subject) -> Iterator[Case]:
    """The same chain of torch.add."""
    workload = subject.on_gpu
    x, y, out = (torch.zeros(workload.m, 4096, dtype=torch.bfloat16, device=workload.device) for _ in range(3))

    def add(x: torch.Tensor, y: torch.Tensor) -> None:
        torch.add(x, y, out=out)

    yield _chain("chain-torch.add", "torch.add", workload, _repeated(add, (x, y)))


def chain_graph(subject: Subject) -> Iterator[Case]:
    """The chain of `hdispatch.ops` replayed from one CUDA graph."""
    workload = subject.served("cuda")
    yield _chain("chain-cuda-graph", subject.op.name, workload, _captured(workload, subject.op, CHAIN).replay)


def _repeated(call: Callable[..., object], arguments: Arguments) -> Callable[[], None]:
    def chain() -> None:
        for _ in range(CHAIN):
            call(*arguments)

    return chain


def _chain(path: str, op: str, workload: Workload, chain: Callable[[], object]) -> Case:
    def run() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        chain()
        torch.cuda.synchronize(workload.device)
        start.record()
        chain()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e6 / CHAIN

    return Case(path, op, "fixed", run)


# ---- the table ----


def publish_pick_table(subject: Subject) -> None:
    """Put a table of 300 keys of the op (20 hidden sizes, 15 buckets), and one function, in place of the null driver's."""
    builder = _C.TableBuilder(-1, 0, False)
    builder.set_ladder(subject.op, list(PICK_EDGES))
    builder.add_module("none", b"none")
    code = {"file": "none", "function": "none", "params": [], "num_warps": 1, "shared_bytes": 0}
    code |= {"cluster": [1, 1, 1], "cooperative": False, "pdl": False}
    empty = {
        "launcher": "cubin",
        "kernel": "none",
        "m_min": 1,
        "m_max": 2**31 - 1,
        "grid": [[1], [1], [1]],
        "params": [],
        "guards": [],
    }
    record = builder.add_record(subject.op, {**empty, "cubins": {"other": code}})
    variant = subject.cpu.variant.name
    for k in PICK_HIDDEN:
        for bucket in range(len(PICK_EDGES)):
            builder.add_row(subject.op, variant, k, 0, bucket, record)
    _add_function(builder)
    builder.publish()


def function_call() -> tuple[_C.Op, Arguments]:
    """An op and a call of it with three tensors on the CPU, which `publish_pick_table` lets a function serve."""
    spec = spec_of(FUNCTION_OP)
    made = spec.sample(_function_variant(), FUNCTION_SIZES, torch.device("cpu"), torch.Generator().manual_seed(0))
    return get_op(FUNCTION_OP), tuple(made)


def _function_variant() -> Variant:
    return max(spec_of(FUNCTION_OP).variants(), key=lambda variant: len(variant.none))


def _add_function(builder: _C.TableBuilder) -> None:
    """A row that calls a TVM-FFI function which does nothing with three tensors, None and the stream."""
    op, variant = get_op(FUNCTION_OP), _function_variant().name
    record: dict[str, Any] = {"kernel": "none", "function": "none", "m_min": 1, "m_max": 2**31 - 1, "guards": []}
    args = functions.default_args(spec_of(FUNCTION_OP), variant, "argument")
    index = builder.add_function(op, record | {"args": args, "pdl": False, "env_stream": False}, _C.bench_function())
    builder.set_ladder(op, list(PICK_EDGES))
    bucket = _C.bucket(PICK_EDGES, FUNCTION_SIZES["M"])
    builder.add_row(op, variant, FUNCTION_SIZES["K"], 0, bucket, index)


def withdraw_pick_table() -> None:
    """Take whatever table the null driver has away."""
    _C.withdraw(-1)


def ffi_function(_subject: Subject) -> Iterator[Case]:
    """A TVM-FFI function of three tensors that does nothing, by its pointer in a C loop: the floor of a row that calls it."""
    yield from _of_function("tvm-ffi-function", _C.bench_function_ns)


def ffi_row(_subject: Subject) -> Iterator[Case]:
    """The same function as a row of the table, from C: checks, key, probe and arguments, without a door."""
    yield from _of_function("tvm-ffi-row", _C.bench_dispatch_ns)


def _of_function(path: str, measure: Callable[[_C.Op, Arguments, int], float]) -> Iterator[Case]:
    op, arguments = function_call()
    yield Case(path, op.name, "fixed", lambda: measure(op, arguments, FUNCTION_CALLS))


def ffi_ops(subject: Subject) -> Iterator[Case]:
    """The same row through `hdispatch.ops`, called from Python."""
    op, arguments = function_call()
    calls = [arguments] * subject.calls
    yield Case("tvm-ffi-ops", op.name, "fixed", call_batch(op, lambda: calls, calls[:1]))


def config_pick(subject: Subject) -> Iterator[Case]:
    """From sizes to the row's index, called from Python: 80,000 picks of 8 shapes among 300 keys, as in vLLM's PR 40850."""
    index = [each.name for each in subject.cpu.spec.variants()].index(subject.cpu.variant.name)
    shapes: list[Arguments] = [(m, k, 0, index) for m, k in PICK_SHAPES]
    if any(subject.op.pick(*shape) is None for shape in shapes):
        raise Unavailable("the table of 300 keys is not in place")
    picks = shapes * (PICKS // len(shapes))
    yield Case("config-pick", subject.op.name, "cycling", call_batch(subject.op.pick, lambda: picks, shapes))


def table_probe(_subject: Subject) -> Iterator[Case]:
    """The probe alone, in C: random hits among 10,000 rows."""

    def run() -> float:
        ns: float = _C.bench_probe_ns(PROBE_ROWS, PROBES)
        return ns

    yield Case("table-probe", f"{PROBE_ROWS} rows", "fixed", run)


# ---- helpers ----


def _m_position(workload: Workload) -> int:
    """Index of the argument whose first dimension is M."""
    for index, arg in enumerate(workload.spec.args):
        if isinstance(arg, TensorArg) and arg.dims[:1] == ("M",) and not arg.mutated and not arg.optional:
            return index
    raise Unavailable(f"no argument of {workload.spec.name} has M as its first dimension")


def _import(package: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken install fails in any way it likes
        raise Unavailable(f"{package} cannot be imported: {first_line(error)}") from error
