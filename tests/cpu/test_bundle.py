"""Bundles as they are read: files, lengths, checksums, versions, names, and which bundle it is."""

from __future__ import annotations

import hashlib
import os
import random
import resource

import hdispatch
import pytest
import toy
from hdispatch.manifest import ARTIFACTS, CHECKSUM_NAME, MANIFEST_NAME, SCHEMA_VERSION
from toy_bundles import ALL_FILES, ONE, changed, refusal, serves

pytestmark = pytest.mark.usefixtures("nothing_loaded")


def test_a_whole_bundle_is_read(written):
    manifest, contents = hdispatch.read_bundle(written)
    assert manifest == toy.manifest()
    assert contents == toy.files()
    assert hdispatch.read_bundle(str(written)) == (manifest, contents)


def test_a_file_that_is_not_listed_is_ignored(written):
    (written / "notes.txt").write_text("hello")
    (written / ARTIFACTS / "two.cubin").write_text("hello")
    assert set(hdispatch.read_bundle(written)[1]) == set(toy.files())


def test_a_link_within_the_bundle_is_followed(written):
    (written / ONE).rename(written / "elsewhere")
    (written / ONE).symlink_to("../elsewhere")
    assert hdispatch.read_bundle(written)[1] == toy.files()


def test_no_bundle_at_all(tmp_path):
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(
            hdispatch.BundleError, match=r"manifest\.json: cannot be read \(No such file or directory\); is .* a bundle"
        ):
            hdispatch.read_bundle(folder)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file(written, name):
    (written / name).unlink()
    with pytest.raises(hdispatch.BundleError, match=f"{name}: cannot be read"):
        hdispatch.read_bundle(written)


@pytest.mark.parametrize("name", ALL_FILES)
def test_another_length(written, name):
    whole = (written / name).read_bytes()
    for content in (b"", whole[:1], whole[: len(whole) // 2], whole[:-1], whole + b"\n", whole + b"\0", whole * 2):
        (written / name).write_bytes(content)
        with pytest.raises(hdispatch.BundleError, match=name):
            hdispatch.read_bundle(written)


@pytest.mark.parametrize("name", ALL_FILES)
def test_one_bit_flipped_in_every_byte(written, name):
    whole = bytearray((written / name).read_bytes())
    chooser = random.Random(name)
    missed = []
    for position in range(len(whole)):
        bit = 1 << chooser.randrange(8)
        whole[position] ^= bit
        (written / name).write_bytes(whole)
        message = refusal(lambda: hdispatch.read_bundle(written))
        if message is None or name not in message:
            missed.append(position)
        whole[position] ^= bit
    assert not missed
    (written / name).write_bytes(whole)
    hdispatch.read_bundle(written)


def test_flipped_bits_never_reach_the_table(good, written):
    chooser = random.Random(1)
    for name in ALL_FILES:
        whole = (written / name).read_bytes()
        for _ in range(20):
            content = bytearray(whole)
            content[chooser.randrange(len(content))] ^= 1 << chooser.randrange(8)
            (written / name).write_bytes(content)
            with pytest.raises(hdispatch.BundleError, match=name):
                hdispatch.load(written, driver="null")
        (written / name).write_bytes(whole)
    assert hdispatch.loaded() == [good]
    assert serves()


OTHER_VERSIONS = [0, SCHEMA_VERSION - 1, SCHEMA_VERSION + 1, -1, 10**100, str(SCHEMA_VERSION), None, [], {}, 1.5, True]


@pytest.mark.parametrize("version", [*OTHER_VERSIONS, float(SCHEMA_VERSION)])
def test_another_schema_version(tmp_path, version):
    toy.write(tmp_path, changed(lambda m: m.update(schema_version=version)))
    wanted = rf"manifest\.json: (schema version .*this hdispatch reads {SCHEMA_VERSION};|malformed: schema_version is)"
    with pytest.raises(hdispatch.BundleError, match=wanted):
        hdispatch.read_bundle(tmp_path)


def test_no_schema_version(tmp_path):
    toy.write(tmp_path, changed(lambda m: m.pop("schema_version")))
    with pytest.raises(hdispatch.BundleError, match=f"schema version None; this hdispatch reads {SCHEMA_VERSION};"):
        hdispatch.read_bundle(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe\x00",
        b"{'a': 1}",
        b"[" * 100_000,
        b'{"schema_version": 1}',
        b"9" * 10_000,
    ],
)
def test_what_is_not_a_manifest(written, text):
    toy.write_text(written, text)
    with pytest.raises(hdispatch.BundleError, match=r"manifest\.json: (not JSON|schema version|malformed)"):
        hdispatch.read_bundle(written)


def test_a_file_of_another_size_is_not_read(written):
    """Sparse files of 64 GiB: neither read nor held."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, words in (
        (ONE, "68719476736 bytes; the manifest says 150: truncated or changed"),
        (MANIFEST_NAME, "68719476736 bytes; at most 268435456 are read"),
        (CHECKSUM_NAME, "68719476736 bytes; at most"),
    ):
        whole = (written / name).read_bytes()
        os.truncate(written / name, 64 * 2**30)
        with pytest.raises(hdispatch.BundleError, match=f"{name}: {words}"):
            hdispatch.read_bundle(written)
        (written / name).write_bytes(whole)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    hdispatch.read_bundle(written)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"rows":', b'"rows": [], "rows":'),
        (b'"kernel": "toy_kernel"', b'"kernel": "other", "kernel": "toy_kernel"'),
        (b'"toy": {', b'"toy": {}, "toy": {'),
        (b'"m_min": 1', b'"m_min": 1, "m_min": 1'),
    ],
)
def test_a_name_twice_in_one_object(good, written, old, new):
    text = (written / MANIFEST_NAME).read_bytes()
    assert old in text
    toy.write_text(written, text.replace(old, new, 1))
    name = old.split(b'"')[1].decode()
    with pytest.raises(hdispatch.BundleError, match=rf"manifest\.json: malformed: .*repeats the name '{name}'"):
        hdispatch.load(written, driver="null")
    assert hdispatch.loaded() == [good]


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("letter", ["é", "€", "🙂"])
def test_a_message_is_cut_between_characters(letter, shift):
    """Of what the core refuses, whose text it cuts at 200 bytes."""
    builder = hdispatch._C.TableBuilder(-1, 0, True)
    for record in (
        {"x" * shift + letter * 300: 1},
        {"launcher": [letter * 300, "x" * shift]},
        {"launcher": "x" * shift + letter},
    ):
        with pytest.raises(hdispatch.BundleError, match=r'field "launcher" is|launcher ".*" is not known'):
            builder.add_record(toy.OP, record)


def test_a_name_with_nul_is_refused_by_the_core_too():
    builder = hdispatch._C.TableBuilder(-1, 0, True)
    with pytest.raises(hdispatch.BundleError, match=r"""field "kernel" is 'a\\x00b'; it takes no NUL"""):
        builder.add_record(toy.OP, {**toy.record(), "kernel": "a\0b"})


def test_one_manifest_alone(good, written):
    wanted = hashlib.sha256((written / MANIFEST_NAME).read_bytes()).hexdigest()
    hdispatch.load(written, driver="null", sha256=wanted)
    hdispatch.load(written, driver="null", sha256=wanted.upper())
    good = hdispatch.load(good.folder, driver="null")
    toy.write(written, changed(lambda m: m.update(hdispatch="0.0")))  # a whole bundle, of somebody else
    found = hashlib.sha256((written / MANIFEST_NAME).read_bytes()).hexdigest()
    hdispatch.read_bundle(written)
    with pytest.raises(hdispatch.BundleError, match=rf"manifest\.json: its SHA-256 is {found}, not {wanted}: another bundle"):
        hdispatch.load(written, driver="null", sha256=wanted)
    for wrong in ("", wanted[:-1], wanted + "0", "x" * 64, "٣" * 64):
        with pytest.raises(hdispatch.BundleError, match="it takes the 64 hexadecimal digits"):
            hdispatch.load(written, driver="null", sha256=wrong)
    assert hdispatch.loaded() == [good]
