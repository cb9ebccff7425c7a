"""Make the running environment complete: install what is missing, then the package, editable.

What is there already stays: an environment with a CUDA build of torch, or one without a network, is used as it is.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: what builds the extension; with --no-build-isolation they are not installed by pip itself
BUILD_TOOLS = ["scikit-build-core>=0.10", "pybind11>=2.13"]


def unmet(requirement: str) -> bool:
    """True if the environment does not satisfy `requirement`."""
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        return not wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return True


def pip(*arguments: str) -> None:
    """Run pip in this environment; its failure ends the set-up."""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments], check=True)


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
        pip("packaging")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    supported = next(d for d in project["dependencies"] if d.startswith("torch"))
    if unmet(supported):
        pip(options.torch)
    wanted = BUILD_TOOLS + tools()
    for extra in filter(None, options.extras.split(",")):
        wanted += project["optional-dependencies"][extra]
    missing = [requirement for requirement in wanted if unmet(requirement)]
    if missing:
        pip(*missing)
    if not options.only_tools:
        pip("--no-build-isolation", "--no-deps", "--editable", str(ROOT))


if __name__ == "__main__":
    main()
