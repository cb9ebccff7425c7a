"""Make the running environment complete: install what is missing, then the package, editable.

What is there already stays: an environment with a CUDA build of torch, or one without a network, is used as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: what builds the extension; with --no-build-isolation they are not installed by pip itself
BUILD_TOOLS = ["scikit-build-core>=0.10", "pybind11>=2.13"]
#: the Triton of torch's builds for CUDA, where it is not the newest that we take; its builds for the CPU ask for none
TRITON = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7", "2.14": "3.8"}
#: seconds between two lines about a step that is under way
INTERVAL = 10


def unmet(requirement: str) -> bool:
    """True if the environment does not satisfy `requirement`."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        return not wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return True


def pip(step: str, *arguments: str, progress: Callable[[], str] = str) -> None:
    """Run pip in this environment and say `step`, then every ten seconds how long it has taken and what `progress` says.

    pip's own output is shown if it fails, which ends the set-up.
    """
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    start = time.monotonic()
    say(f"{step} ...")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                status = process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                say(f"  {time.monotonic() - start:.0f} s {progress()}".rstrip())
        output.seek(0)
        said = output.read()
    if status:
        sys.exit(f"{said}\nset-up: {step}: pip ended with status {status}")
    say(f"  done in {time.monotonic() - start:.0f} s")


def say(line: str) -> None:
    """A line on stderr, at once."""
    print(f"set-up: {line}", file=sys.stderr, flush=True)


def compiled(since: float) -> str:
    """How many files of the extension have been compiled since a time: the build folder tells, pip does not."""
    database = max((ROOT / "build").glob("*/compile_commands.json"), key=lambda path: path.stat().st_mtime, default=None)
    if database is None or database.stat().st_mtime < since:
        return ""
    total = len(json.loads(database.read_text()))
    done = sum(path.stat().st_mtime >= since for path in database.parent.rglob("*.o"))
    return f"{done} of {total} files compiled"


def with_its_triton(requirements: list[str]) -> list[str]:
    """The requirements, that of Triton narrowed to the one that belongs to the installed torch."""
    series = TRITON.get(".".join(importlib.metadata.version("torch").split(".")[:2]))
    return [f"{each},=={series}.*" if series and each.startswith("triton>") else each for each in requirements]


def tools() -> list[str]:
    """CMake and Ninja, where the machine has none."""
    return [name for name in ("cmake", "ninja") if not shutil.which(name)]


def main() -> None:
    """Install; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", required=True, help="requirement to install where torch is missing")
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--only-tools", action="store_true", help="do not build and install the package")
    options = parser.parse_args()
    try:
        import packaging  # noqa: F401
    except ImportError:
        pip("installing packaging", "packaging")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = next(d for d in project["dependencies"] if d.startswith("torch"))
    if unmet(supported):
        pip(f"installing {options.torch} (the largest download)", options.torch)
    wanted = BUILD_TOOLS + tools()
    for extra in filter(None, options.extras.split(",")):
        wanted += project["optional-dependencies"][extra]
    missing = with_its_triton([requirement for requirement in wanted if unmet(requirement)])
    if missing:
        pip(f"installing {', '.join(missing)}", *missing)
    if not options.only_tools:
        start = time.time()
        arguments = ("--no-build-isolation", "--no-deps", "--editable", str(ROOT))
        pip("compiling the extension, some 90 s on two cores", *arguments, progress=lambda: compiled(start))


if __name__ == "__main__":
    main()
