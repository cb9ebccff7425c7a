"""The wheel is complete: the extension, kernels, configs, stubs; and it works where nothing else of ours is."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import hdispatch
import pytest
import toy
from hdispatch import archive

pytest.importorskip("scikit_build_core", reason="builds a wheel without isolation")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wheel(tmp_path_factory.mktemp("wheel"))


def make_wheel(folder: Path, *settings: str) -> Path:
    """A wheel of this tree in `folder`, with settings for CMake."""
    # In the build folder of `pip install`: what that has compiled is not compiled again.
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--wheel-dir", str(folder), *(f"-Ccmake.define.{setting}" for setting in settings), str(ROOT)]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "wheel.lock").open("w") as lock:  # another worker of pytest's may want one too
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_what_is_in_it(names):
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"hdispatch/libhdispatch_core.so", "hdispatch/_build_info.py"} <= names
    doors = {f"torch_{minor.replace('.', '_')}" for minor in hdispatch._build_info.TORCH_VERSIONS}
    for door in doors:
        assert {f"hdispatch/{door}/_C{suffix}", f"hdispatch/{door}/_noop_cuda_guard.so"} <= names
    assert {"hdispatch/_C.pyi", "hdispatch/_build_info.pyi", "hdispatch/py.typed"} <= names
    sources = [("python/hdispatch", "hdispatch"), ("kernels", "hdispatch/kernels"), ("configs", "hdispatch/configs")]
    for folder, inside in sources:
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                assert f"{inside}/{path.relative_to(ROOT / folder).as_posix()}" in names


def test_what_is_not_in_it(names):
    assert {name.split("/")[0] for name in names} == {"hdispatch", f"hdispatch-{hdispatch.__version__}.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".h", ".pyc", ".cubin")) or "test_" in name]


def test_its_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"hdispatch-{hdispatch.__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode()
        assert "Requires-Dist: torch<2.16,>=2.11" in metadata
        assert "License-Expression: Apache-2.0" in metadata
        assert f"{info}/licenses/LICENSE" in archive.namelist()
        assert "hdispatch = hdispatch.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_it_works_by_itself(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # Without site: an editable installation would be found first.
    code = f"""
import sys
sys.path[:0] = {[str(tmp_path), *(path for path in sys.path if path.endswith("site-packages"))]!r}
import torch, hdispatch
assert hdispatch.__file__.startswith({str(tmp_path)!r}), hdispatch.__file__
name = "dynamic_per_token_scaled_fp8_quant"
spec = hdispatch.registry.spec(name)
args = spec.sample(spec.variants()[0], {{"M": 4, "K": 2048}}, torch.device("cpu"), torch.Generator().manual_seed(0))
getattr(torch.ops.hdispatch, name)(*args)
assert hdispatch.stats()[name]["fallbacks"] == 1
print("works")
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "works\n", done.stderr


def test_with_bundles_inside_a_fresh_environment_is_served(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "embedded_bundles.py"), "h200", "h100", "--out", str(tmp_path)]
    select = ["--ops", "silu_and_mul", "--shapes", "N=12288", "--variants", "bfloat16", "--jobs", "1"]
    printed = subprocess.run([*script, *select], capture_output=True, text=True, check=True).stdout
    packed = tmp_path / "sm_90a-h200-h100.tar.xz"
    assert printed.splitlines()[-1] == str(packed)
    made = make_wheel(tmp_path / "dist", f"HDISPATCH_EMBED_BUNDLE={packed}")
    assert f"hdispatch/bundles/{packed.name}" in zipfile.ZipFile(made).namelist()
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", made]
    subprocess.run(install, check=True)
    # torch is here already: found behind what the environment has itself
    own = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    (own / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    code = """
import torch, hdispatch
bundle = hdispatch.load(driver="null")
x, out = torch.randn(4, 24576, dtype=torch.bfloat16), torch.empty(4, 12288, dtype=torch.bfloat16)
with hdispatch.strict():
    hdispatch.ops.silu_and_mul(out, x)
print(hdispatch.__file__, bundle.folder, bundle.rows, hdispatch.stats()["silu_and_mul"]["hits"])
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("HDISPATCH_BUNDLE", "PYTHONPATH")}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    file, bundle, rows, hits = done.stdout.split()
    assert Path(file).is_relative_to(own)
    assert Path(bundle) == own / "hdispatch" / "bundles" / packed.name / "h200"
    assert int(rows) > 0
    assert hits == "1"


def test_a_bundle_must_be_named_by_its_architecture(tmp_path):
    (tmp_path / "bundle.tar.xz").write_bytes(b"")
    with pytest.raises(AssertionError, match="HDISPATCH_EMBED_BUNDLE is"):
        make_wheel(tmp_path / "dist", f"HDISPATCH_EMBED_BUNDLE={tmp_path / 'bundle.tar.xz'}")


def test_the_next_wheel_has_no_bundle(tmp_path):
    """CMake's build folder is kept; the setting is not, whether the build with it succeeded or was refused."""
    archive.pack(toy.write(tmp_path / "toy"), tmp_path / "sm_90a.tar.xz")
    with_bundle = make_wheel(tmp_path / "with", f"HDISPATCH_EMBED_BUNDLE={tmp_path / 'sm_90a.tar.xz'}")
    assert "hdispatch/bundles/sm_90a.tar.xz" in zipfile.ZipFile(with_bundle).namelist()
    for attempt in ("after one with", "after a refused one"):
        made = make_wheel(tmp_path / attempt)
        assert not [name for name in zipfile.ZipFile(made).namelist() if name.startswith("hdispatch/bundles")]
        with pytest.raises(AssertionError, match="HDISPATCH_EMBED_BUNDLE is"):
            make_wheel(tmp_path / "refused", f"HDISPATCH_EMBED_BUNDLE={tmp_path / 'none.tar.xz'}")
