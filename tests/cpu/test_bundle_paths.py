"""Paths and links of a bundle that leave it."""

from __future__ import annotations

import os
from typing import Any

import hdispatch
import pytest
import toy
from hdispatch.manifest import ARTIFACTS, MANIFEST_NAME
from toy_bundles import ONE, changed

pytestmark = pytest.mark.usefixtures("nothing_loaded")


def relisted(name: str) -> dict[str, Any]:
    """The first artifact under another name."""
    return changed(
        lambda m: (
            m["files"].update({name: m["files"].pop(ONE)}),
            [c.update(file=name) for c in m["records"][0]["cubins"].values()],
        )
    )


def test_paths_that_leave_the_bundle(tmp_path, written):
    secret = tmp_path / "secret"
    secret.write_bytes(toy.files()[ONE])
    for name in (
        "../secret",
        str(secret),
        f"{ARTIFACTS}/../../secret",
        "..",
        "../bundle/" + ONE,
        "/",
        "/etc/passwd",
        "/dev/zero",
    ):
        toy.write(written, relisted(name))
        with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: lists .*, which is outside the bundle"):
            hdispatch.read_bundle(written)


def test_links_that_leave_the_bundle(tmp_path, written):
    secret = tmp_path / "secret"
    secret.write_bytes(toy.files()[ONE])
    (written / ONE).unlink()
    (written / ONE).symlink_to(secret)
    with pytest.raises(hdispatch.BundleError, match=r"lists 'artifacts/one.cubin', which is outside the bundle"):
        hdispatch.read_bundle(written)
    (written / "out").symlink_to(tmp_path)
    toy.write(tmp_path / "other", relisted("out/secret"))
    (tmp_path / "other" / "out").symlink_to(tmp_path)
    with pytest.raises(hdispatch.BundleError, match="outside the bundle"):
        hdispatch.read_bundle(tmp_path / "other")


def test_names_that_are_no_files(written):
    (written / "folder").mkdir()
    (written / "loop").symlink_to("loop")
    os.mkfifo(written / "pipe")
    for name in ("folder", "pipe", "loop", "", ".", "a\0b", "\ud800", "x" * 5000, "missing", "folder/missing", ONE + "/x"):
        toy.write(written, relisted(name))
        with pytest.raises(hdispatch.BundleError, match=r"not a file|cannot be read|hold no NUL|half of a character"):
            hdispatch.read_bundle(written)


def test_a_folder_in_place_of_a_manifest(tmp_path):
    (tmp_path / MANIFEST_NAME).mkdir()
    with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: is not a file"):
        hdispatch.read_bundle(tmp_path)
