"""Random calls of adopted Triton kernels: what C++ launches against what Triton compiles and launches for the same call.

A call's result is the object that Triton's cache has for its own key of the call; what reaches the driver is bit by bit what
Triton's launcher passes. A call that Triton refuses must be refused. Calls come through `kernel[grid]` and `run`; grids are
tuples, lists, functions that are traced and callables that are not, of one to three dimensions, some without blocks.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import adopted_kernels as kernels
import hdispatch
import torch
import triton
import triton.language as tl
import triton_stub
from adopted_calls import OUT, X, Y, fresh, launched, wrapper
from triton import knobs
from triton.runtime import jit

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

INTEGERS = (0, 1, 2, 15, 16, 17, 32, 1000, 1024, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, -16, -1)
FLOATS = (0.0, 1.0, -0.0, 2.5, 1e-30, 1e300, float("inf"), float("nan"), -3.14159)
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
    torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def as_null(launch: triton_stub.Launch) -> dict[str, Any]:
    """A launch of Triton's as the null driver shows those of C++."""
    cluster = launch.attributes.get(4, (1, 1, 1))
    return {
        "grid": (launch.grid[0] // cluster[0] * cluster[0], *launch.grid[1:]),
        "block": launch.block,
        "shared": launch.shared,
        "pdl": launch.attributes.get(6, (0,))[0] == 1,
        "cooperative": launch.attributes.get(2, (0,))[0] == 1,
        "cluster": cluster,
        "params": launch.params,
    }


def compare(stub: triton_stub.Stub, kernel: Any, grid: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Makes a call, which is launched as Triton launches it. Whether C++ launched it; the first call of a key is Triton's."""
    result, got = launched(lambda: kernel[grid](*args, **keywords))
    stub.expect([kind for kind in _flat(result.src.signature.values()) if kind != "constexpr"])
    hdispatch.unadopt(kernel)
    before = stub.launches
    wanted = kernel[grid](*args, **keywords)
    hdispatch.adopt(kernel, driver="null")
    assert stub.launches == before + 1
    assert result is wanted, (args, keywords)
    if got is None:
        return False
    assert {key: got[key] for key in as_null(stub.last())} == as_null(stub.last()), (args, keywords)
    return True


# ---- calls ----


def float_tensor(rng: random.Random) -> torch.Tensor:
    """Of 4 bytes an element, at any alignment."""
    base = rng.choice((X, Y, OUT))
    return base[rng.choice((0, 0, 4, 8, 1, 3)) :].view(rng.choice((torch.float32, torch.float32, torch.int32)))


def any_tensor(kinds: random.Random, rng: random.Random) -> torch.Tensor:
    """Of any dtype and alignment (`kinds` says which), of any rank and strides; empty at times."""
    made = rng.choice((X, Y, OUT)).view(kinds.choice(DTYPES))[16 * rng.randrange(3) + kinds.choice((0, 0, 1, 3)) :][:1024]
    form = rng.randrange(7)
    if form == 0:
        return made[:0]
    if form == 1:
        return made[::2]
    if form == 2:
        return made[:960].view(30, 32).t()
    return made[0] if form == 3 else made


class Computes:
    """A callable that is no function: it is called each time."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        self.grid = grid

    def __call__(self, _meta: dict[str, Any]) -> tuple[int, ...]:
        """What it holds."""
        return self.grid


def any_grid(
    rng: random.Random, names: Sequence[str], args: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, tuple[int, ...]]:
    """A grid of some form, and the dimensions that it comes to."""
    dimensions = (rng.randrange(1, 9), rng.randrange(1, 4), rng.randrange(1, 3))[: rng.randrange(1, 4)]
    if rng.random() < 0.02:
        dimensions = (*dimensions[:-1], 0)
    form = rng.randrange(6)
    if form == 0:
        return list(dimensions), dimensions
    if form == 1:
        return Computes(dimensions), dimensions
    if form == 2:
        elements, block = rng.randrange(1, 4000), rng.choice((32, 64, 1000))
        return (lambda _meta: (triton.cdiv(elements, block), *dimensions[1:])), (-(-elements // block), *dimensions[1:])
    if form == 3 and "n" in names:
        n = given(names, args, keywords, "n")
        if type(n) is int:
            return (lambda meta: (meta["n"] % 7 + 1, *dimensions[1:])), (n % 7 + 1, *dimensions[1:])
    return dimensions, dimensions


def given(names: Sequence[str], args: tuple[Any, ...], keywords: dict[str, Any], name: str) -> Any:
    """An argument of a call by its parameter's name; None if it is not given."""
    index = list(names).index(name)
    return args[index] if index < len(args) else keywords.get(name)


def integer(rng: random.Random) -> int:
    return rng.choice(INTEGERS) if rng.random() < 0.5 else rng.randrange(0, 4000)


def integer_of(kinds: random.Random, rng: random.Random) -> int:
    """Of a kind that Triton tells apart; the values of a kind at its edges."""
    ranges = {
        "one": (1,),
        "of 32 bits": (2, 15, 17, 1001, -1, -15, 2**31 - 1, -(2**31) + 1, 2 * rng.randrange(2000) + 1),
        "of 32 bits, by 16": (0, 16, -16, 1024, 2**31 - 16, -(2**31), 16 * rng.randrange(2000)),
        "of 64 bits": (2**31 + 1, 2**63 - 1, -(2**31) - 1, -(2**63) + 1, 2**40 + rng.randrange(1, 16)),
        "of 64 bits, by 16": (2**31, 2**40, -(2**31) - 16, -(2**63)),
    }
    return rng.choice(ranges[kinds.choice(list(ranges))])


def small(rng: random.Random) -> int:
    """What a kernel that steps over tensors takes."""
    return rng.choice((1, 2, 15, 16, 17, 64, 100, 101, 128, 1000))


def _calls(rng: random.Random, kinds: random.Random) -> dict[str, Callable[[], Arguments]]:
    """A random call of each kernel. What makes keys of kernels with many arguments is taken from `kinds`."""
    t, n = (lambda: float_tensor(rng)), (lambda: integer(rng))
    a, k, pick = (lambda: any_tensor(kinds, rng)), (lambda: integer_of(kinds, rng)), kinds.choice
    f, b, block = (lambda: rng.choice(FLOATS)), (lambda: rng.random() < 0.5), (lambda: rng.choice((32, 64)))

    def optional() -> Arguments:
        bias = rng.choice((None, Y, Y[1:]))
        return (X, bias, OUT), {"HAS_BIAS": bias is not None, **rng.choice(({}, {"ACTIVATION": "none"}))}

    return {
        "nop": lambda: ((), {"num_warps": rng.choice((1, 4))}),
        "add": lambda: ((t(), t(), t()), {"BLOCK": block(), "n": n()}),
        "scalars": lambda: ((X, n(), f(), b(), n()), rng.choice(({}, {"BLOCK": 64}))),
        "typed": lambda: ((X, rng.choice((f(), 1, 16, 7)), rng.choice((1, 2, 16, 48)), b(), f()), {}),
        "unspecialized": lambda: ((X, n(), n()), {"k": n()}),
        "unaligned": lambda: ((t(), X), {"n": n()}),
        "optional": optional,
        "cast": lambda: ((X, t(), rng.choice((tl.float32, tl.int32)), rng.choice((0, 1, 1.0, True, 0.5))), {}),
        "strides": lambda: ((X, OUT, n(), rng.choice((1, 2, 16)), 16, 1, 1), {"columns": n(), "BLOCK": 32}),
        "function_argument": lambda: ((t(), OUT, kernels.double), {}),
        "captured": lambda: ((t(), t()), {}),
        "pointers_last": lambda: ((n(), f(), t(), t()), {}),
        # Of those below only the signatures matter.
        "any_dtypes": lambda: ((a(), a(), a()), {}),
        "integers": lambda: (tuple(k() for _ in range(8)), {}),
        "floats": lambda: ((f(), f()), {"c": pick((f(), k())), "d": f()}),
        "bools": lambda: ((b(), b(), pick((True, 1, 0, False))), {"d": b()}),
        "nones": lambda: (tuple(pick((None, a(), k(), f())) for _ in range(3)), {}),
        "defaults": lambda: ((a(), *(k() for _ in range(kinds.randrange(4)))), pick(({}, {"flag": b()}, {"scale": f()}))),
        "constants": lambda: (
            (pick(("a", "b", "")), pick((1, True, 1.0, 0, 0.0, -0.0, False)), pick((None, tl.int8, 2**40))),
            {"D": pick((tl.constexpr(3), 3, tl.bfloat16, -1))},
        ),
        "small_integers": lambda: ((pick((1, 2, 16, 100)), pick((-1, 16)), pick((3, 32)), small(rng)), {}),
        "unsigned": lambda: ((small(rng) % 256, small(rng), pick((2**32, 2**63, 1, 16))), {}),
        "by_index": lambda: ((a(), k(), k()), {"m": k()}),
        "no_alignment": lambda: ((a(), a(), k()), {}),
        "debugged": lambda: ((a(), k()), {"num_warps": pick((1, 2)), "num_stages": pick((1, 3))}),
        "three_strides": lambda: ((a(), *(k() for _ in range(6))), {"BLOCK": pick((32, 64)), "o": a()}),
        "nineteen": lambda: ((*(a() for _ in range(5)), *(k() for _ in range(9)), pick((32, 64)), *(32 for _ in range(4))), {}),
        "mixed": lambda: ((k(), a(), f(), None, b()), {"x": a(), "m": k(), "C": pick(("x", 1))}),
        "named": lambda: ((), {"y": a(), "x": a(), "n": k(), "s": f()}),
        "options": lambda: ((a(), k()), _options(kinds)),
        "fifty_eight": lambda: (
            (*(a() for _ in range(14)), *(k() for _ in range(26)), *(pick((1, 32, True, None, "s")) for _ in range(18))), {}
        ),
        "tuples": lambda: ((pick(((a(), k()), (k(), f(), None, b(), a(), k()), (), (k(), (f(), a())), [])), a(), k()), {}),
        "unspecialized_tuples": lambda: ((k(), (a(), k(), a())), {"other": (k(),)}),
        "refused": lambda: rng.choice((
            ((X, n()), {}), ((X, n(), 32, 1), {}), ((X, 2**64, 32), {}), ((X, -(2**70), 32), {}), ((X, n(), 32), {"x": X}),
            ((X, n()), {"BLOCK": 32, "no_such_option": 1}), (("text", n(), 32), {}), ((X, object(), 32), {}),
            ((X, n(), [32]), {}), ((X, n(), 32), {}),
        )),
        # Wrappers.
        "tuned": lambda: ((t(), OUT, small(rng)), {}),
        "heuristic": lambda: ((t(), OUT, small(rng)), {"BLOCK": block()}),
        "tuned_of_two": lambda: ((t(), OUT, small(rng), rng.choice((1, 16, 48))), {}),
        "heuristic_of_tensors": lambda: ((a(), a(), k()), {}),
    }  # fmt: skip


def _flat(kinds: Iterable[Any]) -> Iterable[str]:
    """Types of a signature, those of tuples' items in their places."""
    for kind in kinds:
        yield from [kind] if isinstance(kind, str) else _flat(kind)


def _options(kinds: random.Random) -> dict[str, Any]:
    """Some of Triton's options, in any order."""
    found = {
        "num_warps": kinds.choice((1, 4, 8)), "num_stages": kinds.choice((1, 4)), "num_ctas": kinds.choice((1, 2)),
        "launch_pdl": kinds.random() < 0.5, "launch_cooperative_grid": kinds.random() < 0.3,
    }  # fmt: skip
    names = kinds.sample(list(found), kinds.randrange(len(found) + 1))
    return {name: found[name] for name in names}


#: The kernels whose code does something, and all.
NAMED = (
    "nop", "add", "scalars", "typed", "unspecialized", "unaligned", "optional", "cast", "strides", "function_argument",
    "captured", "pointers_last",
)  # fmt: skip
ALL = tuple(_calls(random.Random(), random.Random()))
#: Left to Triton: integers of other widths, what it refuses.
TRITONS = ("small_integers", "unsigned", "refused")
WRAPPERS = ("tuned", "heuristic", "tuned_of_two", "heuristic_of_tensors")

OPTIONS: dict[str, dict[str, Any]] = {
    "unspecialized": {"do_not_specialize": ["n", "m"]},
    "unaligned": {"do_not_specialize_on_alignment": ["n", "x"]},
    "unspecialized_tuples": {"do_not_specialize": ["other"], "do_not_specialize_on_alignment": ["some"]},
    "by_index": {"do_not_specialize": [1, 3]},
    "no_alignment": {"do_not_specialize_on_alignment": [0, 2]},
    "debugged": {"debug": True},
}


def kernels_of(names: Iterable[str]) -> dict[str, Any]:
    """Adopted kernels of one's own."""
    made = {}
    for name in names:
        kernel = getattr(kernels, name)
        made[name] = wrapper(kernel) if name in WRAPPERS else fresh(kernel, **OPTIONS.get(name, {}))
        hdispatch.adopt(made[name], driver="null")
    return made


# ---- checking ----


def triton_key(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """Triton's own key of a call."""
    keywords = {**keywords, "debug": kernel.debug or knobs.runtime.debug, "instrumentation_mode": ""}
    if hasattr(knobs.compilation, "fpsan_homomorphic_casts"):  # Triton 3.9
        keywords["fpsan_homomorphic_casts"] = False
    _, keys, _, _, binder = kernel.device_caches[0]
    _, specialization, options = binder(*args, **keywords)
    key: str = jit.compute_cache_key(keys, specialization, options)
    return key


@dataclass
class Tally:
    """What became of the calls."""

    calls: int = 0
    served: int = 0  # launched from C++
    compared: int = 0  # parameter by parameter with Triton's own launch
    refused: int = 0  # by Triton, and by the adopted kernel
    empty: int = 0  # grids without blocks: nothing is launched
    wrong: list[str] = field(default_factory=list)
    by_kernel: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def check(stub: triton_stub.Stub, made: dict[str, Any], rng: random.Random, count: int, kinds: int = 12) -> Tally:
    """Makes random calls of adopted kernels and judges each; one in seven, and the first of each kernel, is compared.

    kinds   of calls of a kernel with many arguments, each of which Triton compiles
    """
    kind = random.Random()
    tally, makers, names = Tally(), _calls(rng, kind), list(made)
    for number in range(count):
        name = rng.choice(names)
        kind.seed(f"{name} {rng.randrange(kinds)}")
        args, keywords = makers[name]()
        names_of = _function(made[name]).arg_names
        grid, dimensions = any_grid(rng, names_of, args, keywords)
        launch = Launch(made[name], grid, dimensions, args, keywords, by_run=rng.random() < 0.2)
        of_kernel = tally.by_kernel[name]
        tally.calls += 1
        of_kernel["calls"] += 1
        compares = number % 7 == 0 or of_kernel["served"] < 40
        try:
            outcome = _judge(stub, launch, name, compares)
        except AssertionError as error:
            tally.wrong.append(f"call {number}: {name}{args}{keywords} on {grid} = {dimensions}: {error}")
            hdispatch.adopt(made[name], driver="null")
            continue
        tally.served += outcome == "served"
        tally.refused += outcome == "refused"
        tally.empty += outcome == "empty"
        tally.compared += outcome == "served" and compares
        of_kernel[outcome] += 1
    return tally


@dataclass
class Launch:
    """One call."""

    kernel: Any
    grid: Any
    dimensions: tuple[int, ...]
    args: tuple[Any, ...]
    keywords: dict[str, Any]
    by_run: bool

    def __call__(self) -> Any:
        """Makes it."""
        if self.by_run:
            return self.kernel.run(*self.args, grid=self.grid, warmup=False, **self.keywords)
        return self.kernel[self.grid](*self.args, **self.keywords)


def _function(kernel: Any) -> Any:
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    return kernel


def _is_refused_by_triton(launch: Launch, kind: type[Exception]) -> bool:
    hdispatch.unadopt(launch.kernel)
    try:
        launch()
    except kind:
        return True
    finally:
        hdispatch.adopt(launch.kernel, driver="null")
    return False


def _judge(stub: triton_stub.Stub, launch: Launch, name: str, compares: bool) -> str:
    kernel, wanted = launch.kernel, None
    if name not in WRAPPERS:
        try:
            wanted = triton_key(kernel, launch.args, launch.keywords)
        except Exception as error:  # Triton refuses the call
            try:
                launched(launch)
            except type(error):
                return "refused"
            raise AssertionError(f"Triton raises {error!r}, and the adopted kernel does not") from None
    before = stub.launches
    try:
        result, got = launched(launch)
    except AssertionError:
        raise
    except Exception as error:  # Triton refuses to compile it, or to launch it
        if _is_refused_by_triton(launch, type(error)):
            return "refused"
        raise AssertionError(f"it raises {error!r}, and Triton does not") from None
    if wanted is not None:
        assert result is kernel.device_caches[0][0][wanted], "it is another kernel than Triton's"
    if 0 in launch.dimensions:
        assert got is None, "an empty grid is launched"
        assert stub.launches == before, "an empty grid is launched by Triton"
        return "empty"
    if got is None:
        assert stub.launches > before, "nothing is launched"
        return "triton"
    cluster, dimensions = got["cluster"][0], (*launch.dimensions, 1, 1)[:3]
    assert got["grid"] == (dimensions[0] * cluster, *dimensions[1:]), "it is another grid"
    assert stub.launches == before, "Triton launches it too"
    if compares:
        assert compare(stub, kernel, launch.grid, launch.args, launch.keywords), "it is served no more"
    return "served"
