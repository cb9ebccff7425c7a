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
from hdispatch.cli.main import main
from hdispatch.compile import DESCRIBED


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


def install_cards(folder: Path, *cards: str) -> Path:
    """The archive of a bundle for each of these cards, in this order; an H100's has rows of one size, others' of two."""
    bundles = {}
    for card in cards:
        manifest = toy.manifest((64,)) if card == "h100" else toy.manifest()
        bundles[card] = toy.write(folder.parent / card, manifest | {"target": dict(DESCRIBED[card].manifest())})
    archive.pack_together(bundles, folder / embedded.file_name("sm_90a", cards))
    return folder / f"sm_90a-{'-'.join(cards)}.tar.xz"


def gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, name: str = "A GPU") -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=name, major=major, minor=minor))


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


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200"),
        ("NVIDIA H800", None),
        ("NVIDIA GH200 480GB", None),
        ("Graphics Device", None),
    ],
)
@pytest.mark.parametrize("cards", [("h200", "h100"), ("h100", "h200")])
def test_the_card_decides_by_its_name_and_the_first_serves_others(
    installation: Path, monkeypatch: pytest.MonkeyPatch, name: str, card: str | None, cards: tuple[str, ...]
) -> None:
    made = install_cards(installation, *cards)
    gpu(monkeypatch, 9, 0, name)
    assert embedded.choose(0) == made / (card or cards[0])
    bundle = hdispatch.load(embedded.choose(0), driver="null")
    assert bundle.manifest["target"]["name"] == (card or cards[0])
    assert bundle.rows == (10 if bundle.folder.name == "h100" else 20)
    with hdispatch.strict():
        toy.OP(*toy.arguments(4, 64))
    assert embedded.decide(0).why == (f"the one for {name}" if card else f"the first of {', '.join(cards)}: none is for {name}")


def test_cards_are_called_as_targets_are(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(installation, f"sm_90a-none-{'-'.join(DESCRIBED)}")
    for target in DESCRIBED.values():
        gpu(monkeypatch, 9, 0, target.device_name)
        assert embedded.choose(0).name == target.name


def test_the_null_driver_takes_the_first_cards(installation: Path) -> None:
    made = install_cards(installation, "h200", "h100")
    loaded = hdispatch.load(driver="null")
    assert (loaded.folder, loaded.rows) == (made / "h200", 20)
    embedded.check_any()


def test_a_gpu_of_another_architecture_is_told_which_there_are(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_cards(installation, "h200", "h100")
    gpu(monkeypatch, 8, 0, "NVIDIA A100-SXM4-80GB")
    with pytest.raises(hdispatch.BundleError, match=r"NVIDIA A100-SXM4-80GB \(sm_80\).*with sm_90a; build one with"):
        embedded.choose(0)


def test_the_environment_names_one_of_several(installation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = install_cards(installation, "h200", "h100")
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(made / "h100"))
    assert hdispatch.load(driver="null").rows == 10
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(made))
    with pytest.raises(hdispatch.BundleError, match=r"holds the bundles h100, h200; name one of them: .*\.tar\.xz/h100"):
        hdispatch.load(driver="null")
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(installation / "none.tar.xz" / "h100"))
    with pytest.raises(hdispatch.BundleError, match="which does not exist"):
        hdispatch.load(driver="null")


def test_doctor_and_inspect_say_which_it_is(
    installation: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = install_cards(installation, "h200", "h100")
    assert main(["doctor"]) == 0
    assert f"{made}/h200 (the first of h200, h100: there is no GPU), 20 rows for h200" in capsys.readouterr().out
    assert main(["doctor", str(made / "h100")]) == 0
    assert f"{made}/h100, 10 rows for h100" in capsys.readouterr().out
    assert main(["inspect", str(made / "h100")]) == 0
    assert "10 rows" in capsys.readouterr().out
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(made / "h100"))
    assert main(["doctor"]) == 0
    assert f"{made}/h100 (HDISPATCH_BUNDLE names it), 10 rows for h100" in capsys.readouterr().out
