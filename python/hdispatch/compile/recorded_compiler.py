"""One recorded specialization -> a cubin, in a worker process: the kernel is found again, proven to be it, and compiled.

Imports triton, which asks for the device: import this module after `target.install`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import make_backend  # type: ignore[import-untyped]

from ..errors import BuildError
from ..recorder import REFUSALS
from ..recording import Source, Specialization
from .recorded_kernels import Made
from .store import Store

#: Options that say what a machine has, and no user: those of the target are taken.
_OF_MACHINE = {"arch", "backend_name", "extern_libs"}

#: What of a script is run to find its kernels: definitions, and what they may use.
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)

#: Modules that were made of recorded text, by its SHA-256, and where the text lies.
_made: dict[str, ModuleType] = {}
_folder = tempfile.TemporaryDirectory(prefix="hdispatch-recorded-")


def compile_recorded(lines: list[Specialization], sources: Mapping[str, Source], store: Store) -> list[Made]:
    """The result of each; a problem with one does not stop the others."""
    return [_made_of(line, sources.get(line["module_sha256"]), store) for line in lines]


def _made_of(line: Specialization, source: Source | None, store: Store) -> Made:
    try:
        if line["triton"] != triton.__version__:
            raise BuildError(f"recorded with triton {line['triton']}; {triton.__version__} is installed")
        kernel = _find(line["module"], line["qualname"], line["source_hash"], source)
        cubin, metadata = _compile(kernel, line, source)
    except BuildError as error:
        return {"file": "", "metadata": "", "problem": str(error)}
    except Exception as error:  # Triton may raise anything; it is this kernel's problem alone
        if (name := type(error).__name__) in REFUSALS and line.get("refused") == name:
            return {"file": "", "metadata": "", "problem": "", "refused": _message(error)}
        return {"file": "", "metadata": "", "problem": f"{type(error).__name__}: {str(error).strip()[:500]}"}
    # More shared memory than the target has is no problem here: Triton asks the GPU, and raises OutOfResources, as it launches.
    return {"file": store.put_blob(cubin), "metadata": metadata, "problem": ""}


def _message(error: Exception) -> str:
    """What an error says, but ptxas' temporary files, as equal recordings make equal bundles, and what no manifest holds."""
    text = str(error)
    if type(error).__name__ == "PTXASError":
        text = re.sub(r"\S*\.ptx\b", "kernel.ptx", text.partition("\nRepro command:")[0]).strip()
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()


def _compile(kernel: Any, line: Specialization, source: Source | None) -> tuple[bytes, str]:
    """The code, and Triton's metadata as it wrote it."""

    def decode(value: Any) -> Any:
        return decoded(value, source)

    _, _, target, backend, _ = kernel.device_caches[0]  # makes the kernel's compiler, too
    usual = make_backend(GPUTarget("cuda", line["capability"], target.warp_size)).parse_options({}).__dict__
    options = {name: decode(value) for name, value in line["options"].items() if name not in _OF_MACHINE}
    given = {name: value for name, value in options.items() if name not in usual or value != usual[name]}
    signature = {name: decode(kind) for name, kind in line["signature"].items()}
    constants = {tuple(path): decode(value) for path, value in line["constants"]}
    attrs = {tuple(path): decode(value) for path, value in line["attrs"]}
    compiled = kernel.compile(
        kernel.ASTSource(kernel, signature, constants, attrs), target=target, options=backend.parse_options(given).__dict__
    )
    metadata = next(Path(path) for name, path in compiled.metadata_group.items() if name.endswith(".json"))
    return compiled.asm["cubin"], metadata.read_text()


def decoded(value: Any, source: Source | None) -> Any:
    """What `recorder.encode` was given, functions from `source` too. BuildError for what a recording cannot hold."""
    if isinstance(value, list):
        return [decoded(each, source) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tuple":
        return tuple(decoded(each, source) for each in inner)
    if kind == "float":
        return float(inner)
    if kind == "dtype":
        return tl.dtype(inner)
    if kind == "constexpr":
        return tl.constexpr(decoded(inner, source))
    if kind == "function":
        module, name, source_hash = inner.split(":")
        return _find(module, name, source_hash, source if source is not None and source["module"] == module else None)
    if kind == "enum":
        module, qualname, name = inner.split(":")
        return _member(module, qualname, name, source)
    raise BuildError(f"a constant is {inner}, which a recording cannot hold")


def _member(module: str, qualname: str, name: str, source: Source | None) -> Any:
    """A member of an enum of a module that can be imported, or whose recorded text this is."""
    try:
        found: Any = _imported(module, None)
    except Exception as error:  # whatever an import raises
        if source is None or source["module"] != module:
            raise BuildError(f"a constant is {qualname}.{name} of {module}: {type(error).__name__}: {error}") from error
        found = _from_text(module, source)
    for part in (*qualname.split("."), name):
        if not hasattr(found, part):
            raise BuildError(f"a constant is {qualname}.{name} of {module}, which has no {part} here")
        found = getattr(found, part)
    return found


# ---- finding the kernel ----


def _find(module: str, qualname: str, source_hash: str, source: Source | None) -> Any:
    """The function, from the module of its name, else from the module's recorded text. BuildError if neither has it.

    Its hash proves that it is the one: Triton makes it of its source and of all that it uses.
    """
    if "<locals>" in qualname:
        raise BuildError(f"{qualname} is defined inside a function; those of a module can be found again")
    why = []
    for found in (_imported, _from_text):
        try:
            kernel = _in_module(found(module, source), qualname)
        except Exception as error:  # whatever an import raises
            why.append(str(error) if isinstance(error, BuildError) else f"{type(error).__name__}: {error}")
            continue
        if kernel.cache_key == source_hash:
            return kernel
        why.append(f"the source of {qualname}, or of a function or constant that it uses, is another one here")
    raise BuildError("; ".join(dict.fromkeys(why)))


def _imported(module: str, _source: Source | None) -> ModuleType:
    if module == "__main__":
        raise BuildError("it is a script's")
    return importlib.import_module(module)


def _from_text(module: str, source: Source | None) -> ModuleType:
    if source is None:
        raise BuildError(f"the text of {module} is not in the recording")
    if source["sha256"] not in _made:
        _made[source["sha256"]] = _module_of(source)
    return _made[source["sha256"]]


def _module_of(source: Source) -> ModuleType:
    """A module of recorded text, which lies in a file, for whoever asks for its lines."""
    is_script = source["module"] == "__main__"
    path = Path(_folder.name, source["sha256"], "script.py" if is_script else source["module"].rpartition(".")[2] + ".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(source["text"])
    spec = importlib.util.spec_from_file_location("recorded_script" if is_script else source["module"], path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(module.__name__, module)
    if is_script:
        _run_definitions(source["text"], path, module)
    else:
        spec.loader.exec_module(module)
    return module


def _run_definitions(text: str, path: Path, module: ModuleType) -> None:
    """A script's imports, definitions and assignments, but nothing that it does; what fails is left out."""
    for statement in ast.parse(text).body:
        if isinstance(statement, _DEFINITIONS):
            code = compile(ast.Module([statement], []), str(path), "exec")
            try:
                exec(code, module.__dict__)
            except Exception as error:
                print(f"{path.name}, line {statement.lineno}: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201


def _in_module(module: ModuleType, qualname: str) -> Any:
    """A `triton.JITFunction` of a module, without what is around it: autotuners, heuristics."""
    found: Any = module
    for part in qualname.split("."):
        if not hasattr(found, part):
            raise BuildError(f"{module.__name__} has no {qualname}")
        found = getattr(found, part)
    while not hasattr(found, "cache_key") and hasattr(found, "fn"):
        found = found.fn
    if not hasattr(found, "cache_key"):
        raise BuildError(f"{module.__name__}.{qualname} is a {type(found).__name__}, no Triton kernel")
    return found
