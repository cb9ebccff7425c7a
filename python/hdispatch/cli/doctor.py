"""`hdispatch doctor`: what is installed, which backends work, which bundle would be served, and why not."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _build_info, bundle_reader, embedded, kernel_packages
from ..bench import busy, machine
from ..errors import BundleError, HdispatchError
from .text import count, print_json

#: The releases that `hdispatch.adopt` was checked with, which uses private parts of them; the first one it needs.
ADOPTED = {"triton": ("3.6", "3.7", "3.8", "3.9"), "helion": ("1.5",)}
#: Names the bundle that doctor and bench take when none is given.
BUNDLE_VARIABLE = embedded.VARIABLE
NO_BUNDLE = (
    f"no bundle is given, {BUNDLE_VARIABLE} is not set, and this installation has none for the GPU here; {embedded.ADVICE}"
)

DESCRIPTION = """\
Say what is installed, which backends can build and why not, whether the GPU can be reached, whether a bundle would be served
here, down to the reason if not, and whether the plug-ins would serve vLLM and SGLang. Launches nothing. Where the extension
does not fit the torch that is installed, that is what it says.

  hdispatch doctor                  the environment, and $HDISPATCH_BUNDLE, or else the bundle of this installation
  hdispatch doctor bundle           the same with this bundle

Exit code 0 unless the question itself cannot be answered: an environment that cannot serve is an answer, not an error.
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "doctor",
        help="say what works here, and why not",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bundle", metavar="DIR", type=Path, nargs="?", help="a bundle (default: $HDISPATCH_BUNDLE, else the installation's)"
    )
    parser.add_argument("--sha256", metavar="DIGEST", help="the digest that the bundle's manifest must have")
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, problem: str = "") -> int:
    """Examine and print. `problem`: why the extension cannot be imported."""
    bundle, why = _choose_bundle(arguments.bundle)
    found = examine(bundle, arguments.sha256, problem, why)
    if arguments.json:
        print_json(found)
    else:
        print(describe(found))
    return 0


def run_without_extension(argv: Sequence[str], problem: str) -> int:
    """The command line where the extension cannot be imported: `doctor` reports it, anything else is an error."""
    if argv[:1] != ["doctor"]:
        print(f"hdispatch: error: {problem}", file=sys.stderr)
        return 1
    top = argparse.ArgumentParser("hdispatch")
    add_parser(top.add_subparsers(dest="command", required=True))
    try:
        arguments = top.parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    return run(arguments, problem)


def default_bundle(given: Path | None) -> Path | None:
    """The bundle given, else the environment's, else the package's own for the GPU here (without one: any), else None."""
    return _choose_bundle(given)[0]


def _choose_bundle(given: Path | None) -> tuple[Path | None, str]:
    """That, and why this one where none is given."""
    if given:
        return given, ""
    if named := os.environ.get(BUNDLE_VARIABLE):
        return Path(named), f"{BUNDLE_VARIABLE} names it"
    try:
        return embedded.decide(torch.cuda.current_device() if torch.cuda.is_available() else -1)
    except BundleError:
        return None, ""


# ---- examining ----


def examine(bundle: Path | None, sha256: str | None = None, problem: str = "", why: str = "") -> dict[str, Any]:
    """Everything that `describe` says, as plain data. Each part that can fail is {"ok": bool, "reason": str, …}.

    sha256   that of the bundle's manifest, if it must be a certain one
    problem  why the extension cannot be imported, if it cannot
    why      this bundle, where none was given
    """
    extension, gpu = _examine_extension(problem), _examine_gpu()
    driver = _examine_driver(extension["ok"])
    served = _examine_bundle(bundle, sha256, extension["ok"], gpu["ok"]) | {"why": why}
    problems = [part["reason"] for part in (extension, driver, gpu, served) if not part["ok"]]
    return {
        "versions": machine.versions() | {"driver": machine.driver_version(), "cpu": machine.cpu_model()},
        "extension": extension,
        "driver": driver,
        "gpu": gpu,
        "backends": {name: _examined(check) for name, check in BACKENDS.items()},
        "bundle": served,
        "vllm": _examine_vllm(extension["ok"]),
        "sglang": _examine_sglang(extension["ok"]),
        "adopt": _examined(_check_adopt),
        "host": _examine_host(),
        "serving": {"ok": not problems, "reason": "; ".join(problems)},
    }


def _examine_extension(problem: str) -> dict[str, Any]:
    found = {
        "ok": not problem,
        "reason": problem,
        "built_with_torch": list(_build_info.TORCH_VERSIONS.values()),
        "file": None,
        "ops": [],
    }
    if problem:
        return found
    from .. import _C, registry

    return found | {"file": _C.__file__, "ops": sorted(registry.names())}


def _examine_driver(extension: bool) -> dict[str, Any]:
    if not extension:
        return {"ok": False, "reason": "not looked for without the extension"}
    from .. import _C

    missing = _C.driver_missing()
    return {"ok": not missing, "reason": missing}


def _examine_gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
        return {"ok": False, "reason": f"no GPU: {why}", "devices": []}
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    facts = [
        {"name": each.name, "compute_capability": [each.major, each.minor], "sm_count": each.multi_processor_count}
        for each in devices
    ]
    return {"ok": True, "reason": "", "devices": facts}


def _examine_bundle(folder: Path | None, sha256: str | None, extension: bool, gpu: bool) -> dict[str, Any]:
    """Verify a bundle and load all of it but the code: on the null driver."""
    if folder is None:
        return {"ok": False, "reason": NO_BUNDLE, "folder": None}
    found: dict[str, Any] = {"ok": False, "reason": "", "folder": str(folder), "rows": None, "target": None}
    try:
        if not extension:
            bundle_reader.read_bundle(folder, sha256=sha256)
            return found | {"reason": f"{folder} is whole, but cannot be loaded without the extension"}
        from .. import runtime

        loaded = runtime.load(folder, driver="null", sha256=sha256)
        loaded.unload()
        found |= {"rows": loaded.rows, "target": loaded.manifest["target"]["name"]}
        runtime.check_host(folder, loaded.manifest)
        if gpu:
            runtime.check_target(folder, loaded.manifest, torch.cuda.current_device())
    except HdispatchError as error:
        return found | {"reason": str(error)}
    return found | {"ok": True}


def _examine_vllm(extension: bool) -> dict[str, Any]:
    """Whether `vllm serve` would be served by the plug-in."""
    if not extension:
        reason = "not looked for without the extension"
        found = {"ok": False, "reason": reason, "version": None, "models": [], "decode": ""}
        return found | {"layers": "", "runner": "", "scheduler": ""}
    from ..integrations.vllm import plugin

    return plugin.examine()


def _examine_sglang(extension: bool) -> dict[str, Any]:
    """Whether SGLang would be served by the plug-in."""
    if not extension:
        return {"ok": False, "reason": "not looked for without the extension", "version": None, "ops": [], "left": {}}
    from ..integrations.sglang import plugin

    return plugin.examine()


def _examine_host() -> dict[str, Any]:
    """Whether this machine is idle enough to measure times now."""
    ns = busy.empty_call_ns()
    busy_now = busy.is_busy(ns)
    return {"ok": not busy_now, "reason": busy.describe(ns) if busy_now else "", "empty_call_ns": round(ns, 1)}


def _examined(check: Callable[[], str]) -> dict[str, Any]:
    """A backend's check gives what it found, or raises."""
    try:
        return {"ok": True, "found": check(), "reason": ""}
    except Exception as error:  # a broken install fails in any way it likes
        reason = str(error) if isinstance(error, HdispatchError) else f"{type(error).__name__}: {error}"
        return {"ok": False, "found": None, "reason": reason}


def _check_helion() -> str:
    return _check_package("helion")


def _check_triton() -> str:
    return _check_package("triton")


def _check_tvm_ffi() -> str:
    version = machine.package_version("apache-tvm-ffi")
    if version is None:
        raise HdispatchError("not installed: pip install 'hdispatch[ffi]'; hdispatch.register needs it, bundles do not")
    if not _satisfies(version, ">=0.1.11,<0.2"):
        raise HdispatchError(f"{version} is installed; hdispatch takes the C ABI of 0.1: apache-tvm-ffi>=0.1.11,<0.2")
    return version


def _check_link() -> str:
    """The linker for a bundle's host functions."""
    from ..compile import ffi_link

    archive = ffi_link.runtime_archive()
    return f"{' '.join(ffi_link.compiler())}, {archive or 'without CuteDSL'}"


def _check_package(name: str) -> str:
    version = machine.package_version(name)
    if version is None:
        raise HdispatchError("not installed: pip install 'hdispatch[build]'")
    wanted = required_versions().get(name, "")
    if wanted and not _satisfies(version, wanted):
        raise HdispatchError(f"{version} is installed; hdispatch builds with {name}{wanted}")
    importlib.import_module(name)
    return version


def required_versions() -> dict[str, str]:
    """Name -> version specifier of what the build wing needs, as hdispatch's metadata has it."""
    found = {}
    for line in importlib.metadata.requires("hdispatch") or ():
        requirement, _, marker = line.partition(";")
        if "build" in marker:
            name = requirement.strip()
            end = next((i for i, letter in enumerate(name) if letter in "<>=!~ "), len(name))
            found[name[:end]] = name[end:].strip()
    return found


def _satisfies(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # only the build wing needs it
        return True
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _check_adopt() -> str:
    """The releases whose kernels `hdispatch.adopt` takes over, beside those that it was checked with."""
    checked = " and ".join(f"{name} {', '.join(ADOPTED[name])}" for name in ADOPTED)
    found = {name: machine.package_version(name) for name in ADOPTED}
    if found["triton"] is None:
        raise HdispatchError(f"Triton is not installed; hdispatch.adopt was checked with {checked}")
    others = [f"{name} {here}" for name, here in found.items() if here and _minor(here) not in ADOPTED[name]]
    if others:
        raise HdispatchError(f"{' and '.join(others)} is installed; hdispatch.adopt was checked with {checked}")
    return f"{', '.join(f'{name} {here}' for name, here in found.items() if here)}; checked with {checked}"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _check_kernels() -> str:
    """The ops that builds know without an option: our own, and those that installed distributions name."""
    from ..compile import build_unit, op_package

    foreign = kernel_packages.installed()
    for package in foreign:
        build_unit.load_spec(package)
    others = f", {', '.join(foreign)}" if foreign else ""
    return f"{count(len(op_package.available_ops()), 'op')} of hdispatch{others}"


def _check_ptxas() -> str:
    """The assembler that Triton would use for the GPU here, else for an H200."""
    from ..compile import target, versions

    wanted = target.resolve("native" if torch.cuda.is_available() else "h200")
    path = versions.ptxas(wanted)
    if not shutil.which(path):
        raise HdispatchError(f"{path} cannot be executed")
    return f"{versions.tool_versions('triton', wanted)['ptxas']}, {path}"


def _check_configs() -> str:
    """Kernels and their tuned configs come with the package."""
    folders = {name: importlib.util.find_spec(f"hdispatch.{name}") for name in ("kernels", "configs")}
    roots = {name: list(found.submodule_search_locations or ()) if found else [] for name, found in folders.items()}
    files = {str(path.parent.name) for root in roots["configs"] for path in Path(root).glob("*/*.json")}
    if not roots["kernels"] or not files:
        raise HdispatchError("hdispatch is installed without its kernels or their configs; reinstall it")
    return f"of {count(len(files), 'op')}, in {roots['configs'][0]}"


BACKENDS: dict[str, Callable[[], str]] = {
    "helion": _check_helion,
    "triton": _check_triton,
    "ptxas": _check_ptxas,
    "configs": _check_configs,
    "kernels": _check_kernels,
    "tvm_ffi": _check_tvm_ffi,
    "linker": _check_link,
}


# ---- printing ----


def describe(found: dict[str, Any]) -> str:
    """The findings as text."""
    versions, extension, bundle = found["versions"], found["extension"], found["bundle"]
    lines = ["versions", *(f"  {name:10} {value or 'none'}" for name, value in versions.items())]
    lines += [
        "extension",
        f"  built with torch {', '.join(extension['built_with_torch'])}: {_verdict(extension, extension['file'])}",
        f"  ops: {', '.join(extension['ops']) or 'none'}",
        "serving",
        f"  libcuda    {_verdict(found['driver'], 'found')}",
        f"  GPU        {_verdict(found['gpu'], ', '.join(each['name'] for each in found['gpu']['devices']))}",
        f"  bundle     {_verdict(bundle, _words_of_bundle(bundle))}",
        f"  host       {_verdict(found['host'], _words_of_host(found['host']))}",
        f"  vLLM       {_verdict(found['vllm'], _words_of_vllm(found['vllm']))}",
        f"  SGLang     {_verdict(found['sglang'], _words_of_sglang(found['sglang']))}",
        f"  adopt      {_verdict(found['adopt'], found['adopt']['found'])}",
    ]
    lines += ["building", *(f"  {name:10} {_verdict(each, each['found'])}" for name, each in found["backends"].items())]
    lines.append(
        "hdispatch would serve calls here" if found["serving"]["ok"] else f"hdispatch would not serve calls here: {_why(found)}"
    )
    return "\n".join(lines)


def _why(found: dict[str, Any]) -> str:
    parts = {"extension": found["extension"], "libcuda": found["driver"], "GPU": found["gpu"], "bundle": found["bundle"]}
    return ", ".join(name for name, part in parts.items() if not part["ok"]) + "; see above"


def _words_of_bundle(bundle: dict[str, Any]) -> str:
    why = f" ({bundle['why']})" if bundle["why"] else ""
    return f"{bundle['folder']}{why}, {count(bundle['rows'], 'row')} for {bundle['target']}" if bundle["ok"] else ""


def _words_of_host(host: dict[str, Any]) -> str:
    return f"an empty Python call takes {host['empty_call_ns']:.0f} ns"


def _words_of_vllm(vllm: dict[str, Any]) -> str:
    if not vllm["ok"]:
        return ""
    decode = f"the layers of {', '.join(vllm['models'])}; decode steps take {vllm['decode']}"
    layers = f"vLLM's own layers: {vllm['layers']}" if vllm["layers"] else decode
    runner = f"vLLM's own model runner: {vllm['runner']}" if vllm["runner"] else "its model runner's decode steps"
    plans = f"vLLM's own scheduler: {vllm['scheduler']}" if vllm["scheduler"] else "its scheduler's plans of them"
    return f"{vllm['version']}, its ops; {layers}; {runner}; {plans}"


def _words_of_sglang(sglang: dict[str, Any]) -> str:
    left = "".join(f"; {target} stays its own: {why}" for target, why in sglang["left"].items())
    return f"{sglang['version']}, served by rows of {', '.join(sglang['ops'])}{left}" if sglang["ok"] else ""


def _verdict(part: dict[str, Any], found: str) -> str:
    return f"ok: {found}" if part["ok"] else f"no: {part['reason']}"
