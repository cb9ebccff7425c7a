"""What a Helion kernel's host function does, as a record that C++ runs (csrc/adopted_host.h).

After Helion's own call the compiled variant that it chose is known. Where Helion chooses by dtypes and ranks alone (no
`hl.specialize`, no tensor descriptors, `static_shapes=False`), the variant's host function is traced once on fake tensors of
open sizes, as the build does, and the record serves every call whose sizes satisfy what was assumed: an M never seen too. Else
it is run once more on the call's own tensors, without the launch, and the record serves that shape alone.

All use of Helion's private parts for this is here (checked with Helion 1.5). Imports helion.
"""

from __future__ import annotations

import inspect
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
import triton  # type: ignore[import-untyped]
from helion.autotuner import aot_cache  # type: ignore[import-untyped]
from torch._dynamo.source import ConstantSource, LocalSource, TensorProperty, TensorPropertySource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction  # type: ignore[import-untyped]

from ..compile import expr
from ..errors import BuildError
from .host_program import INT64, Op, Steps
from .triton_state import State, number_of

MAX_OUTPUTS = 8  # csrc/adopted_host.cpp, and the same number of views of them
MAX_RANK = 32
MAX_INT32 = 2**31 - 1

_OPERATORS = {
    "+": Op.ADD, "-": Op.SUB, "*": Op.MUL, "//": Op.DIV, "%": Op.MOD, "min": Op.MIN, "max": Op.MAX, "==": Op.EQ, "!=": Op.NE,
    "<": Op.LT, "<=": Op.LE, ">": Op.GT, ">=": Op.GE, "and": Op.AND, "or": Op.OR,
}  # fmt: skip

#: What a heuristic of Helion's compiler may choose by that is the same for every call on one device, which is part of the key.
#: On a GPU such a heuristic looks at every pointwise kernel.
_OF_DEVICES = ("device_num_sm", "config_num_sm")

#: csrc/adopted_host.h, HostRecord::Param::Kind
_OBJECT, _INTEGER, _ARGUMENT, _OUTPUT = range(4)


class _Refused(Exception):
    """Why there is no record."""


def kernel_state(kernel: Any) -> State:
    """What all records of a kernel depend on."""
    settings = kernel.settings
    dicts = [vars(kernel)]
    if settings.backend != "triton":
        return -1, f"backend {settings.backend}", dicts, [], []
    if settings.distributed or getattr(kernel, "_declares_process_group", False):
        return -1, "distributed kernel", dicts, [], []
    of_settings = id(settings), settings.static_shapes, id(kernel._key_fn)
    token = ("helion", id(kernel), getattr(kernel, "_reset_generation", 0), *of_settings)
    number = number_of(token)
    return number, "" if number > 0 else "more states than are kept", dicts, [], []


def record(kernel: Any, args: tuple[Any, ...], adopt: Callable[[Any], Any]) -> str | dict[str, Any]:
    """The record of a call that Helion has just made; or why calls of this shape stay Helion's.

    adopt   makes a Triton kernel's entry and returns it
    """
    bound = kernel.bind(args)
    host = bound._run
    if host is None:
        return "not compiled"
    for function in _functions(host):
        adopt(function)  # the launch at least
    if not _has_known_key(kernel):
        return "key function"
    problems: list[str] = []
    for make in (_open, _exact):
        try:
            made = make(bound, args)
        except (_Refused, BuildError) as error:
            problems.append(str(error))
            continue
        except Exception as error:  # anybody's code, on stand-ins; the call itself has been made
            problems.append(_described(error))
            continue
        kernel_entry = adopt(made.pop("kernel"))
        if kernel_entry is None:
            return "its Triton kernel cannot be adopted"
        return {**made, "note": "".join(problems), "function": kernel_entry, "variant": vars(bound), "run": host}
    return f"host function: {problems[-1]}"


def _described(error: Exception) -> str:
    """An error's message, and where it was raised: a report from another machine has nothing else."""
    said = f"{type(error).__name__}: {error}".splitlines()[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({Path(frame.filename).name}:{frame.lineno}, {frame.name})"


def adopt_launches(kernel: Any, adopt: Callable[[Any], Any]) -> dict[Any, Any]:
    """Adopts the launches of all variants that Helion has made, and returns the dict that it keeps them in."""
    for function in launched_by(kernel):
        adopt(function)
    variants: dict[Any, Any] = kernel._bound_kernels
    return variants


def launched_by(kernel: Any) -> list[Any]:
    """The Triton kernels that the variants may launch which Helion has made."""
    hosts = [bound._run for bound in list(kernel._bound_kernels.values())]
    return [function for host in hosts if host is not None for function in _functions(host)]


def _has_known_key(kernel: Any) -> bool:
    """Whether it chooses by no function, or by the one of `helion.aot_kernel`, which reads shapes, dtypes and numbers."""
    key = kernel._key_fn
    if key is None:
        return True
    return type(key).__name__ == "HeuristicKeyFunction" and key.user_key is None and aot_cache.get_aot_mode() == "evaluate"


def choice(kernel: Any, args: tuple[Any, ...]) -> object:
    """What the key function of an AOT kernel says of a call: calls of one shape and one dtype have the same answer."""
    return kernel._key_fn(*args)


@dataclass
class _Choice:
    """What Helion chose the variant by, beside dtypes and ranks.

    fixed     sizes that are compiled in: (argument, dimension)
    guards    other facts of its key, as steps
    said      by the heuristics of an AOT kernel; None: there are none
    """

    fixed: set[tuple[int, int]] = field(default_factory=set)
    guards: list[Steps] = field(default_factory=list)
    said: object = None


def _choice(bound: Any, args: tuple[Any, ...]) -> _Choice:
    """_Refused for a choice that is not by sizes and strides."""
    kernel, env = bound.kernel, bound.env
    if kernel.settings.static_shapes:
        raise _Refused("static_shapes is True")
    if kernel._key_fn is not None and kernel._key_fn._load_key_function() is None:
        raise _Refused("it is an AOT kernel without heuristics for this GPU, which is compiled for each shape")
    for extractor in getattr(bound, "_compiler_seed_specialization_extractors", ()):
        if extractor.fact not in _OF_DEVICES:
            raise _Refused(f"it is chosen by a heuristic of Helion's, by {extractor.fact}")
    choice = _Choice(said=None if kernel._key_fn is None else kernel._key_fn(*args))
    places = {name: index for index, name in enumerate(kernel.signature.parameters)}

    def leaf(source: Any) -> Steps:
        if not isinstance(source, TensorPropertySource) or not isinstance(source.base, LocalSource):
            raise _Refused(f"it is chosen by {source}")
        index, kinds = places[source.base.local_name], {TensorProperty.SIZE: Op.SIZE, TensorProperty.STRIDE: Op.STRIDE}
        if source.prop not in kinds or not isinstance(args[index], torch.Tensor):
            raise _Refused(f"it is chosen by {source}")
        return [(kinds[source.prop], index, int(source.idx or 0))]

    sources = [env.shape_env.var_to_sources[symbol][0] for symbol in env.specialized_vars]
    sources = [source for source in sources if not isinstance(source, LocalSource)]  # a number: part of every key
    specialized = {*sources, *env.specialized_strides}
    if len(bound._specialize_extra()) != len(specialized) + len(env.specialized_vars) - len(sources):
        raise _Refused("it is chosen by tensor descriptors or values")
    for source in specialized:
        ((op, index, dimension),) = leaf(source)
        value = args[index].size(dimension) if op == Op.SIZE else args[index].stride(dimension)
        choice.guards.append([(op, index, dimension), (Op.CONST, value, 0), (Op.EQ, 0, 0)])
        if op == Op.SIZE:
            choice.fixed.add((index, dimension))
    for extractor in bound._guarded_input_facts():
        choice.guards.append(_fact_steps(getattr(extractor, "extractor", None), args, leaf))
    return choice


def _fact_steps(fact: Any, args: tuple[Any, ...], leaf: Callable[[Any], Steps]) -> Steps:
    """That `size == c` (or not) has the answer that it has for these arguments."""
    if type(fact).__name__ != "_GuardedInputFact":
        raise _Refused(f"it is chosen by a {type(fact).__name__}")
    leaves = {symbol: f"fact {number}" for number, (symbol, _) in enumerate(fact.sources)}
    steps_of = {f"fact {number}": leaf(source) for number, (_, source) in enumerate(fact.sources)}
    holds = fact(args)
    left = [*_steps(fact.lhs, leaves, steps_of), *([(Op.NEXT_POWER_OF_2, 0, 0)] if fact.block else [])]
    return [*left, *_steps(fact.rhs, leaves, steps_of), (Op.EQ if holds == fact.equal else Op.NE, 0, 0)]


# ---- one launch ----


def _functions(host: Callable[..., Any]) -> list[Any]:
    """The Triton kernels that a host function may launch."""
    return [value for value in inspect.unwrap(host).__globals__.values() if isinstance(value, JITFunction)]


#: Held while launches are noted: another thread's recorder of the same kernel would take this one's place.
_one_records = threading.RLock()


class _Launch:
    """What `JITFunction.run` was called with, in place of the launch."""

    kernel: Any = None
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any]


@contextmanager
def _recording(host: Callable[..., Any]) -> Iterator[_Launch]:
    """While it is open, this thread's launches of the host function's kernels are noted instead of made."""
    launch, mine = _Launch(), threading.get_ident()
    kernels = _functions(host)

    def recorder(kernel: Any) -> Callable[..., None]:
        def run(*args: Any, **keywords: Any) -> Any:
            if threading.get_ident() != mine:
                return replaced.get(id(kernel), types.MethodType(type(kernel).run, kernel))(*args, **keywords)
            if launch.kernel is not None:
                raise _Refused("it launches more than one kernel")
            launch.kernel, launch.args, launch.keywords = kernel, args, keywords
            return None

        return run

    with _one_records:
        replaced = {id(kernel): vars(kernel)["run"] for kernel in kernels if "run" in vars(kernel)}
        for kernel in kernels:
            vars(kernel)["run"] = recorder(kernel)
        try:
            yield launch
        finally:
            for kernel in kernels:
                vars(kernel).pop("run", None)
                if id(kernel) in replaced:
                    vars(kernel)["run"] = replaced[id(kernel)]
    if launch.kernel is None:
        raise _Refused("it launches no kernel")


@dataclass
class _Output:
    """A tensor that the host function allocates, and what it fills it with; None: nothing."""

    tensor: torch.Tensor
    fill: float | None = None


#: Factories by name, without `aten.` and the overload: what they fill with, or the position of that among the arguments.
_FILLS = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_FILLS_WITH = {"full": 1, "full_like": 1, "new_full": 2}
#: What only computes with dtypes, which are part of the key.
_OF_DTYPES = ("promote_types", "can_cast")


class _Outputs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets the host function allocate and make views, notes the allocations, and refuses the rest by name.

    What it does to tensors besides is refused wherever it comes: before the launch or after it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[_Output] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        factory = name.split(".")[1]
        if factory.startswith(("empty", "new_empty")) or factory in _FILLS or factory in _FILLS_WITH:
            fill = args[_FILLS_WITH[factory]] if factory in _FILLS_WITH else _FILLS.get(factory)
            if not isinstance(fill, (int, float, type(None))):
                raise _Refused(f"it fills with a {type(fill).__name__}")
            if isinstance(fill, int) and fill not in INT64:
                raise _Refused(f"it fills with {fill}, which 64 bits do not hold")
            if (kwargs or {}).get("pin_memory"):
                raise _Refused("it allocates pinned memory")
            self.made.append(_Output(func(*args, **(kwargs or {})), fill))
            return self.made[-1].tensor
        of_numbers = func.namespace == "prim" or name.startswith("aten.sym_") or factory in _OF_DTYPES
        if not (getattr(func, "is_view", False) or of_numbers):
            raise _Refused(f"it runs {name}")
        return func(*args, **(kwargs or {}))


def _exact(bound: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The record for calls of this very shape."""
    if getattr(bound.env, "runtime_input_specializations", None):
        raise _Refused("it is chosen by what its tensors hold or how large their storage is")
    outputs = _Outputs()
    with _recording(bound._run) as launch, outputs:
        result = bound._run(*args)
    return _describe(launch, outputs.made, args, args, result, {}, ())


def _open(bound: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The record for calls of these dtypes and ranks."""
    choice = _choice(bound, args)
    env = ShapeEnv(duck_shape=False, specialize_zero_one=False)
    mode = FakeTensorMode(shape_env=env)
    leaves: dict[sympy.Symbol, str] = {}
    powers: dict[str, Steps] = {}
    guards = choice.guards
    fakes = [_fake(arg, i, choice, env, mode, leaves) if isinstance(arg, torch.Tensor) else arg for i, arg in enumerate(args)]
    host = _with_powers(bound._run, env, leaves, powers)
    outputs = _Outputs()
    with _recording(bound._run) as launch, mode, outputs:
        result = host(*fakes)
    assumed = [guard.expr for guard in env.guards]
    return {**_describe(launch, outputs.made, args, fakes, result, leaves, assumed, guards, powers), "choice": choice.said}


class _WithPowers:
    """A module that a host function names, with another `next_power_of_2`."""

    def __init__(self, module: types.ModuleType, power: Callable[[Any], Any]) -> None:
        self._module = module
        self.next_power_of_2 = power

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _with_powers(
    host: Callable[..., Any], env: ShapeEnv, leaves: dict[sympy.Symbol, str], powers: dict[str, Steps]
) -> Callable[..., Any]:
    """Runs the host function with `next_power_of_2` of open sizes as leaves; `powers` gets the steps of each by name.

    Triton's is a chain of shifts and ors, which are no expressions here.
    """
    if not isinstance(host, types.FunctionType):
        return host

    def power(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return triton.next_power_of_2(value)
        name = f"power {len(powers)}"
        powers[name] = [*_steps(value, leaves, powers), (Op.NEXT_POWER_OF_2, 0, 0)]
        hint, source = triton.next_power_of_2(value.node.hint), ConstantSource(name.replace(" ", "_"))
        symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
        leaves[symbol] = name
        return env.create_symintnode(symbol, hint=hint, source=source)

    modules = {name: each for name, each in host.__globals__.items() if isinstance(each, types.ModuleType)}
    scope = {name: _WithPowers(each, power) for name, each in modules.items() if hasattr(each, "next_power_of_2")}
    made = types.FunctionType(host.__code__, {**host.__globals__, **scope}, host.__name__, host.__defaults__, host.__closure__)
    made.__kwdefaults__ = host.__kwdefaults__
    return made


def _fake(
    tensor: torch.Tensor, index: int, choice: _Choice, env: ShapeEnv, mode: FakeTensorMode, leaves: dict[sympy.Symbol, str]
) -> torch.Tensor:
    guards = choice.guards
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dimension: -strides[dimension])
    if not tensor.permute(order).is_contiguous():
        raise _Refused("a tensor is not contiguous in any order of its dimensions")
    if tensor.numel() > MAX_INT32:
        raise _Refused("a tensor has more than 2**31 - 1 elements")
    is_plain = tensor.is_contiguous()
    if is_plain:
        guards.append([(Op.CONTIGUOUS, index, 0)])
    elif any(size < 2 for size in tensor.shape):  # their strides say nothing
        raise _Refused("a tensor of size 1 is not contiguous")
    guards.append([(Op.NUMEL, index, 0), (Op.CONST, MAX_INT32, 0), (Op.LE, 0, 0)])
    sizes: list[Any] = []
    for dimension, size in enumerate(tensor.shape):
        if (index, dimension) in choice.fixed:
            sizes.append(size)
            continue
        if size < 2:  # Helion's code is the same, but broadcasting is not
            guards.append([(Op.SIZE, index, dimension), (Op.CONST, size, 0), (Op.EQ, 0, 0)])
            sizes.append(size)
            continue
        guards.append([(Op.SIZE, index, dimension), (Op.CONST, 2, 0), (Op.GE, 0, 0)])
        name = f"{index}.{dimension}"
        source = ConstantSource(f"size_{index}_{dimension}")
        symbol = env.create_symbol(size, source, dynamic_dim=DimDynamic.DYNAMIC)
        leaves[symbol] = name
        sizes.append(env.create_symintnode(symbol, hint=size, source=source))
    if is_plain:
        with mode:
            return torch.empty(sizes, dtype=tensor.dtype, device=tensor.device)
    step: Steps = [(Op.CONST, 1, 0)]
    for dimension in reversed(order):
        guards.append([(Op.STRIDE, index, dimension), *step, (Op.EQ, 0, 0)])
        step = [*step, (Op.SIZE, index, dimension), (Op.MUL, 0, 0)]
    with mode:
        made = torch.empty([sizes[dimension] for dimension in order], dtype=tensor.dtype, device=tensor.device)
        return made.permute([order.index(dimension) for dimension in range(tensor.dim())])


def _describe(
    launch: _Launch,
    made: list[_Output],
    args: Sequence[Any],
    given: Sequence[Any],
    result: Any,
    leaves: dict[sympy.Symbol, str],
    assumed: Sequence[Any],
    guards: Sequence[Steps] = (),
    known: dict[str, Steps] | None = None,
) -> dict[str, Any]:
    """`given` are the arguments that the host function ran on: `args` themselves, or fakes of them."""
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)]
    if not tensors:
        raise _Refused("it takes no tensor")
    for each in made:
        if each.tensor.device != args[tensors[0]].device or each.tensor.layout is not torch.strided:
            raise _Refused(f"it allocates a {each.tensor.layout} tensor on {each.tensor.device}")
    if len(made) > MAX_OUTPUTS:
        raise _Refused(f"it allocates more than {MAX_OUTPUTS} tensors")

    def steps(value: Any) -> Steps:
        return _steps(value, leaves, known)

    storages = {given[i].untyped_storage()._cdata: (_ARGUMENT, i, given[i]) for i in tensors}
    storages |= {each.tensor.untyped_storage()._cdata: (_OUTPUT, i, each.tensor) for i, each in enumerate(made)}

    def parameter(value: Any) -> tuple[int, int, torch.dtype | None, Steps, object]:
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) and not isinstance(value, torch._subclasses.FakeTensor):
                raise _Refused("it passes a subclass of a tensor")
            known = storages.get(value.untyped_storage()._cdata)
            if known is None:
                raise _Refused("it passes a tensor of its own")
            kind, index, base = known
            offset = (value.storage_offset() - base.storage_offset()) * value.element_size()
            return kind, index, value.dtype, steps(offset), None
        if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
            return _INTEGER, 0, None, steps(value), None
        if value is None or isinstance(value, (bool, float, str)) or type(value).__name__ in ("dtype", "constexpr"):
            return _OBJECT, 0, None, [], value
        raise _Refused(f"it passes a {type(value).__name__}")

    def geometry(tensor: torch.Tensor) -> tuple[list[Steps], list[Steps]]:
        if tensor.dim() > MAX_RANK:
            raise _Refused(f"it allocates a tensor of more than {MAX_RANK} dimensions")
        return [steps(size) for size in tensor.shape], [steps(stride) for stride in tensor.stride()]

    kernel, keywords = launch.kernel, dict(launch.keywords)
    grid = keywords.pop("grid", None)
    if keywords.pop("warmup", False) or not isinstance(grid, (tuple, list)) or not 1 <= len(grid) <= 3:
        raise _Refused("its grid is not a tuple of 1 to 3")
    own = [param.name for param in kernel.params]
    bound = inspect.signature(kernel.fn).bind(*launch.args, **{name: keywords.pop(name) for name in own if name in keywords})
    bound.apply_defaults()
    listed, is_tuple = ([result], False) if result is None or isinstance(result, torch.Tensor) else (result, True)
    if not isinstance(listed, (list, tuple)) or type(listed) not in (list, tuple):
        raise _Refused(f"it returns a {type(result).__name__}")
    views: list[tuple[int, torch.Tensor]] = []
    results = [] if result is None else [_returned(value, made, views, given, tensors) for value in listed]
    if len(views) > MAX_OUTPUTS:
        raise _Refused(f"it returns more than {MAX_OUTPUTS} views")
    return {
        "kernel": kernel,
        "is_exact": not guards,
        "choice": None,
        "guards": [*guards, *(steps(each) for each in assumed)],
        "outputs": [(*geometry(each.tensor), each.tensor.dtype, tensors[0], each.fill) for each in made],
        "views": [
            (index, *geometry(view), steps(view.storage_offset() - made[index].tensor.storage_offset()))
            for index, view in views
        ],
        "grid": [steps(size) for size in [*grid, *[1] * (3 - len(grid))]],
        "params": [parameter(bound.arguments[name]) for name in own],
        "names": (*own, *keywords),
        "options": list(keywords.values()),
        "results": results,
        "result": -2 if result is None else -1 if is_tuple else 0,
        "is_tuple": isinstance(result, tuple),
    }


def _returned(
    value: Any, made: list[_Output], views: list[tuple[int, torch.Tensor]], given: Sequence[Any], tensors: list[int]
) -> int:
    """The index of what is returned: an output, after these a view of one (which is noted), or -1 - that of an argument."""
    if isinstance(value, torch.Tensor) and value.requires_grad and all(value is not given[index] for index in tensors):
        raise _Refused("it allocates a tensor that requires grad")
    for index, tensor in enumerate(each.tensor for each in made):  # torch may have made another object of it
        if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
            if value.dtype != tensor.dtype or value.is_conj() or value.is_neg():
                raise _Refused("it returns a view of another dtype")
            if value.shape == tensor.shape and value.stride() == tensor.stride():
                return index
            views.append((index, value))
            return len(made) + len(views) - 1
    for index in tensors:
        if value is given[index]:
            return -1 - index
    raise _Refused("it returns what it neither allocated nor was given")


def _steps(value: Any, leaves: dict[sympy.Symbol, str], known: dict[str, Steps] | None = None) -> Steps:
    if isinstance(value, (torch.SymInt, torch.SymBool)):
        value = value.node.expr
    found: Steps = []
    for token in expr.postfix(int(value) if isinstance(value, (int, sympy.Integer)) else value, leaves):
        if isinstance(token, int):
            found.append((Op.CONST, token, 0))
        elif token in _OPERATORS:
            found.append((_OPERATORS[token], 0, 0))
        elif known is not None and token in known:
            found += known[token]
        else:
            index, dimension = token.split(".")
            found.append((Op.SIZE, int(index), int(dimension)))
    return found


def name_of(kernel: Any) -> str:
    """`module.qualname` of the Python function behind a kernel."""
    return f"{kernel.fn.__module__}.{kernel.fn.__qualname__}"
