"""A build of every row that compiles a tenth of the kernels, in which all that they are made of occurs.

Compiled is of each op and backend every shape, every dtype of an argument, absent argument and compiled-in value, and every
form of config, of Triton's and Helion's with its numbers at both ends: a CuteDSL kernel takes ten seconds.

The others' records are built too, all but the code: a record's grid, parameters, guards and intervals come from tracing, and
of the code it has what Triton decides before it compiles. That is asked of Triton, and the artifact is a stub. Where a
unit is compiled, both are done, and the stub's record must be the compiler's.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
from hdispatch.compile import BuildReport, build, build_unit, builder, ffi_link, pool, store, worker
from hdispatch.compile.build_unit import Unit
from hdispatch.compile.store import Store
from hdispatch.opspec import Variant

#: Set to 1, every unit is compiled: `make test-all`.
WHOLE = "HDISPATCH_TEST_WHOLE"
#: The file with the units to compile, for the worker processes; and the build cache to take compiled code from.
LISTED, CACHE = "HDISPATCH_TEST_COMPILED", "HDISPATCH_TEST_CACHE"

STUB = b"not compiled: "
HERE = Path(__file__).parent
BOOT = f"import sys; sys.path.append({str(HERE)!r}); import sampled_build; sampled_build.serve()"
COMMAND = forked.worker(BOOT)


def build_sampled(out: Path, cache: Path, extra: Sequence[str]) -> BuildReport:
    """Builds all ops for the H200. Code that is compiled goes through the user's build cache; records are kept in `cache`."""
    listed = cache / "compiled.json"
    built = builder._built

    def sampled(units: Sequence[Unit], *others: Any) -> Any:
        chosen = units if os.environ.get(WHOLE) == "1" else cover(units)
        cache.mkdir(parents=True, exist_ok=True)
        listed.write_text(json.dumps(sorted(map(name, chosen))))
        return built(units, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LISTED, str(listed))
        patch.setenv(CACHE, str(store.default_root()))
        patch.setattr(builder, "_built", sampled)
        patch.setattr(pool, "_COMMAND", COMMAND)
        return build(None, "h200", out, extra=extra, cache=cache, jobs=len(os.sched_getaffinity(0)))


def name(unit: Unit) -> str:
    """A unit by what its code depends on."""
    return store.digest(unit.to_json())


def cover(units: Sequence[Unit]) -> list[Unit]:
    """Few units with everything that occurs in any: in each step the one that has most of what is left."""
    ends = ends_of(units)
    occurring = [set(kinds(unit, ends)) for unit in units]
    left = set().union(*occurring)
    chosen = []
    while left:
        best = max(range(len(units)), key=lambda index: len(occurring[index] & left))
        left -= occurring[best]
        chosen.append(units[best])
    return chosen


#: (package, backend, form of a config, name of a number) -> its smallest and its largest value.
Ends = Mapping[tuple[object, ...], tuple[float, float]]


def ends_of(units: Sequence[Unit]) -> Ends:
    """The ends of the numbers in the units' configs."""
    found: dict[tuple[object, ...], set[float]] = {}
    for unit in units:
        for name, number in numbers(unit.config):
            found.setdefault((unit.package, unit.backend, form(unit.config), name), set()).add(number)
    return {key: (min(values), max(values)) for key, values in found.items()}


def numbers(config: Any, path: str = "") -> Iterable[tuple[str, float]]:
    """The numbers in a config, by where they stand."""
    if isinstance(config, (dict, list)):
        for name, value in config.items() if isinstance(config, dict) else enumerate(config):
            yield from numbers(value, f"{path}/{name}")
    elif isinstance(config, (int, float)) and not isinstance(config, bool):
        yield path, config


def form(config: Any) -> str:
    """A config without its numbers' values."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [without(inner) for inner in value]
        return "number" if type(value) in (int, float) else value

    return json.dumps(without(config), sort_keys=True)


def traits(variant: Variant) -> Iterable[tuple[object, ...]]:
    """What a variant is made of: dtypes, what is absent, what is compiled in."""
    yield from (("dtype", name, str(dtype)) for name, dtype in variant.dtypes.items())
    yield from (("none", name) for name in variant.none)
    yield from (("static", name, value) for name, value in variant.static.items())


def kinds(unit: Unit, ends: Ends) -> Iterable[tuple[object, ...]]:
    """What compiles of a unit that may differ between units of one kernel source: each is compiled once at least."""
    spec = build_unit.load_spec(unit.package)
    source = unit.package, unit.backend
    for trait in traits(spec.variant(unit.variant)):
        yield *source, *trait
    yield *source, "form", form(unit.config)
    for at, number in numbers(unit.config) if unit.backend != "cutedsl" else ():
        if number in ends[*source, form(unit.config), at]:
            yield *source, "number", form(unit.config), at, number
    yield *source, "shape", json.dumps(unit.shape, sort_keys=True)
    for bucket in {0, spec.ladders.count - 1} & set(unit.buckets):
        yield *source, "bucket", bucket


def is_stub(artifact: bytes) -> bool:
    """Whether this is in place of a cubin that was not compiled."""
    return artifact.startswith(STUB)


# ---- in the worker processes ----


def serve() -> None:
    """Worker's main, with both ways of compiling in place."""
    chosen = frozenset(json.loads(Path(os.environ[LISTED]).read_text()))
    compiled = Store(Path(os.environ[CACHE]))
    answer, patched = worker._answer, set[str]()

    def answered(request: dict[str, Any], target: Any, cache: Store) -> dict[str, Any]:
        unit = Unit.from_json(request["unit"])
        backend = "cutedsl" if unit.backend == "cutedsl" else "triton"
        if backend not in patched:  # the DSLs are imported after the target is installed
            module = importlib.import_module(f"hdispatch.compile.{backend}_backend")
            {"triton": _patch_triton, "cutedsl": _patch_cutedsl}[backend](module, compiled)
            patched.add(backend)
        global _compiles
        _compiles = name(unit) in chosen
        return answer(request, target, cache)

    worker._answer = answered
    worker.main()


#: Whether the unit in work is one of those to compile.
_compiles = False


def _patch_triton(backend: Any, compiled: Store) -> None:
    compile_class = backend.compile_class

    def sampled(trace: Any, m_class: Any, target: Any, tools: Mapping[str, str], cache: Store, *, early: bool = False) -> Any:
        stub = _triton_stub(backend, trace, m_class)
        if not _compiles:
            cache.put_blob(STUB + stub["sha256"].encode())
            return stub | {"sha256": store.digest(STUB + stub["sha256"].encode())}
        code = compile_class(trace, m_class, target, tools, compiled, early=early)
        cache.put_blob(compiled.blob(code["sha256"]))
        of_the_code = ("sha256", "size", "shared_bytes", "num_warps")
        differing = {key: (stub[key], code[key]) for key in code if key not in of_the_code and stub[key] != code[key]}
        assert not differing, f"the stub's and the compiler's record of {trace.launch.kernel.__name__} differ: {differing}"
        return code

    backend.compile_class = sampled


def _triton_stub(backend: Any, trace: Any, m_class: Any) -> dict[str, Any]:
    """The `Code` of a class of M without the code."""
    wanted, launch = backend.samples(trace, m_class), trace.launch
    kernel = launch.kernel
    found: list[tuple[Any, dict[str, Any]]] = []
    cache = kernel.device_caches[0][0]
    values = [sample.value() for sample in wanted.values()]
    if kernel.is_gluon():
        values = [backend._with_layout(value) if hasattr(value, "block_shape") else value for value in values]
    compile_it = kernel.compile

    def instead(source: Any, target: Any, options: dict[str, Any]) -> Any:
        found.append((source, options))
        return SimpleNamespace(src=source)

    cached = dict(cache)
    cache.clear()
    kernel.compile = instead
    try:
        kernel.warmup(*values, grid=(1,), **launch.options)
    finally:
        kernel.compile = compile_it
        cache.clear()
        cache.update(cached)
    ((source, options),) = found
    return {
        "sha256": store.digest(
            {
                "kernel": kernel.cache_key,
                "samples": {key: sample.key() for key, sample in wanted.items()},
                "options": {key: repr(value) for key, value in launch.options.items()},
            }
        ),
        "size": 0,
        "function": source.name,
        "kinds": backend._kinds(kernel.__name__, source, wanted),
        "maps": {key: _map_stub(backend, each.arg) for key, each in wanted.items() if isinstance(each.arg, backend.Descriptor)},
        "num_warps": options["num_warps"],
        "shared_bytes": 0,
        "cluster": [options["num_ctas"], 1, 1],
        "cooperative": bool(options["launch_cooperative_grid"]),
        "pdl": bool(options["launch_pdl"]),
    }


def _map_stub(backend: Any, arg: Any) -> dict[str, Any]:
    """Triton's choice for a descriptor: its block's layout in shared memory; boxes as wide as the swizzle, 256 rows at most."""
    plain = backend.Sample(arg).value()
    layout = backend._with_layout(plain).layout
    kind = "uint8" if arg.dtype.itemsize == 1 else str(arg.dtype).removeprefix("torch.")
    kind = "tfloat32" if arg.tf32 else kind
    widest = [256] * (len(arg.block_shape) - 1) + [(layout.swizzle_byte_width or 256) // arg.dtype.itemsize]
    box = [min(size, limit) for size, limit in zip(arg.block_shape, widest, strict=True)]
    return {"type": kind, "box": box, "swizzle": layout.swizzle_byte_width}


def _patch_cutedsl(backend: Any, _compiled: Store) -> None:
    compile_object = backend._compile

    def sampled(program: Any, function: str, unit: Unit) -> bytes:
        return compile_object(program, function, unit) if _compiles else _object_stub(function)

    backend._compile = sampled


def _object_stub(function: str) -> bytes:
    """An object file that defines a host function, which does nothing."""
    source = f"int __tvm_ffi_{function}(void* self, const void* args, int count, void* result) {{ return 0; }}\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "function.o"
        command = [*ffi_link.compiler(), "-x", "c", "-fPIC", "-c", "-", "-o", str(path)]
        subprocess.run(command, input=source, text=True, check=True)
        return path.read_bytes()
