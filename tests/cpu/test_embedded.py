"""Which bundle serves when none is named: the environment's, else the installation's for the GPU, else how to build one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import hdispatch
import pytest
import torch
import toy
from hdispatch import archive, embedded
from hdispatch.cli import doctor


@pytest.fixture(autouse=True)
def installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An installation without a bundle."""
    monkeypatch.delenv("HDISPATCH_BUNDLE", raising=False)
    monkeypatch.setattr(embedded, "FOLDER", tmp_path / "bundles")
    (tmp_path / "bundles").mkdir()
    yield tmp_path / "bundles"
    for each in hdispatch.loaded():
        each.unload()


def install(folder: Path, *names: str) -> None:
    toy.write(folder.parent / "toy")
    for name in names:
        archive.pack(folder.parent / "toy", folder / f"{name}.tar.xz")


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A GPU", major=major, minor=minor))


def test_the_installation_serves_the_null_driver(installation: Path) -> None:
    install(installation, "sm_90a")
    assert hdispatch.load(driver="null").folder == installation / "sm_90a.tar.xz"
    with hdispatch.strict():
        toy.OP(*toy.arguments(4, 64))


def test_the_environment_goes_first(installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installation, "sm_90a")
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(toy.write(tmp_path / "mine")))
    assert hdispatch.load(driver="null").folder == tmp_path / "mine"
    monkeypatch.setenv("HDISPATCH_BUNDLE", "")
    assert hdispatch.load(driver="null").folder == installation / "sm_90a.tar.xz"


def test_a_bundle_that_is_named_goes_before_both(installation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installation, "sm_90a")
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(toy.write(tmp_path / "mine")))
    assert hdispatch.load(toy.write(tmp_path / "named"), driver="null").folder == tmp_path / "named"


@pytest.mark.parametrize(("capability", "chosen"), [((9, 0), "sm_90a"), ((8, 0), "sm_80"), ((10, 0), "sm_100a")])
def test_the_gpu_decides(installation: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str) -> None:
    install(installation, "sm_100a", "sm_80", "sm_90a")
    gpu(monkeypatch, *capability)
    assert embedded.choose(0) == installation / f"{chosen}.tar.xz"


def test_another_gpu_is_told_what_to_build(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installation, "sm_90a")
    gpu(monkeypatch, 8, 9)
    with pytest.raises(hdispatch.BundleError, match=r"cuda:0, A GPU \(sm_89\).*with sm_90a; build one with `hdispatch build"):
        embedded.choose(0)


def test_without_any_it_says_how_to_build_one() -> None:
    with pytest.raises(
        hdispatch.BundleError, match="installed without a bundle; build one with `hdispatch build --target native"
    ):
        hdispatch.load(driver="null")
    with pytest.raises(hdispatch.BundleError, match="installed without a bundle"):
        embedded.check_any()
    assert doctor.default_bundle(None) is None
    assert "HDISPATCH_BUNDLE is not set" in doctor.examine(None)["bundle"]["reason"]


def test_a_name_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path / "none"))
    for use in (lambda: hdispatch.load(driver="null"), embedded.check_any):
        with pytest.raises(hdispatch.BundleError, match="which does not exist; make it with `hdispatch build --out"):
            use()
    assert doctor.default_bundle(None) == tmp_path / "none"
    assert not doctor.examine(doctor.default_bundle(None))["bundle"]["ok"]


def test_doctor_examines_what_load_would_take(installation: Path) -> None:
    install(installation, "sm_90a")
    assert doctor.default_bundle(None) == installation / "sm_90a.tar.xz"
    assert doctor.examine(doctor.default_bundle(None))["bundle"]["rows"] == len(toy.manifest()["rows"])
