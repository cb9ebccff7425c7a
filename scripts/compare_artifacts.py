"""Two bundles -> the rows whose artifact differs: whether an edit of kernels' sources changed any machine code.

python scripts/compare_artifacts.py BEFORE AFTER [--ops A,B] [--common]

Builds are deterministic, so that equal rows need no new measurement. Build both with an empty cache, for one target. A cubin
is compared by its SHA-256 and how it is launched. A host function is in one library with all others, under a name that holds
a hash of its sources: of it the machine code of its kernels is compared. Exits with 1 if a row differs or is in one
bundle alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import struct
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from hdispatch.bundle_reader import read_bundle
from hdispatch.manifest import LIBRARY, Manifest, Record

#: e_machine of ELF files with GPU code.
EM_CUDA = 190
_SHT_DYNSYM, _SHT_NOBITS = 11, 8


class Section(NamedTuple):
    """A section of an ELF file: where it is in the file, and the index of the section it refers to."""

    name: str
    type: int
    offset: int
    size: int
    link: int


class Difference(NamedTuple):
    """A row, named in words, and how it differs."""

    row: str
    how: str


def sections(elf: bytes) -> list[Section]:
    """The sections of a 64-bit little-endian ELF file."""
    start, width, count, names = struct.unpack_from("<Q10xHHH", elf, 40)
    raw = [struct.unpack_from("<IIQQQQI", elf, start + i * width) for i in range(count)]
    texts = raw[names][4]
    return [
        Section(elf[texts + name : elf.index(b"\0", texts + name)].decode(), kind, offset, size, link)
        for name, kind, _flags, _address, offset, size, link in raw
    ]


def machine_code(cubin: bytes) -> str:
    """SHA-256 of what a cubin holds for the GPU to run: code, constants and registers of each kernel, without its name."""
    kept = (".text.", ".nv.constant", ".nv.info.", ".nv.shared.")
    parts = []
    for section in sections(cubin):
        if section.name.startswith(kept):
            content = b"" if section.type == _SHT_NOBITS else cubin[section.offset : section.offset + section.size]
            parts.append(f"{section.name.rpartition('.')[0]} {section.size} ".encode() + content)
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()


def embedded_cubins(library: bytes) -> Iterator[bytes]:
    """The cubins in a shared library, in the order in which they lie there."""
    at = library.find(b"\x7fELF", 4)
    while at >= 0:
        if struct.unpack_from("<H", library, at + 18)[0] == EM_CUDA:
            yield library[at:]
        at = library.find(b"\x7fELF", at + 4)


def functions(library: bytes) -> list[str]:
    """The host functions that a shared library exports, by address: the order in which their objects were linked."""
    found = sections(library)
    table = next(section for section in found if section.type == _SHT_DYNSYM)
    texts = found[table.link].offset
    exported = []
    for at in range(table.offset, table.offset + table.size, 24):
        name, _info, _other, section, address, _size = struct.unpack_from("<IBBHQQ", library, at)
        text = library[texts + name : library.index(b"\0", texts + name)].decode()
        if section and text.startswith("__tvm_ffi_"):
            exported.append((address, text.removeprefix("__tvm_ffi_")))
    return [name for _, name in sorted(exported)]


def code_of_functions(library: bytes) -> dict[str, str]:
    """Host function -> hash of its kernel's machine code; of all kernels, where a function has not exactly one."""
    names, codes = functions(library), [machine_code(cubin) for cubin in embedded_cubins(library)]
    if len(names) != len(codes):
        whole = hashlib.sha256(" ".join(sorted(codes)).encode()).hexdigest()
        return dict.fromkeys(names, whole)
    return dict(zip(names, codes, strict=True))


def artifact(record: Record, code: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a record that say which machine code runs, and how it is launched."""
    if record["launcher"] == "tvm_ffi":
        shown: dict[str, Any] = {"code": code[record["function"]], "args": record["args"], "pdl": record["pdl"]}
    else:
        shown = {"cubins": record["cubins"], "grid": record["grid"], "params": record["params"]}
    return shown | {"early": record.get("early", []), "guards": record["guards"]}


def artifacts(manifest: Manifest, contents: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    """The artifact of every row, by the row in words."""
    code = code_of_functions(contents[LIBRARY]) if LIBRARY in contents else {}
    return {
        f"{row['op']} {row['variant']} K={row['K']} N={row['N']} bucket {row['bucket']}": artifact(
            manifest["records"][row["record"]], code
        )
        for row in manifest["rows"]
    }


def compare(before: Mapping[str, dict[str, Any]], after: Mapping[str, dict[str, Any]]) -> list[Difference]:
    """The rows that differ."""
    found = []
    for row in sorted({*before, *after}):
        if row not in before or row not in after:
            found.append(Difference(row, "only in " + ("BEFORE" if row in before else "AFTER")))
            continue
        fields = [name for name in before[row] if before[row][name] != after[row].get(name)]
        if fields or before[row].keys() != after[row].keys():
            found.append(Difference(row, "other " + ", ".join(fields or ["launcher"])))
    return found


def main() -> int:
    """Compare; print the rows that differ and a line that counts them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--ops", metavar="A,B", help="these ops only (default: all)")
    parser.add_argument("--common", action="store_true", help="only the rows that both have, where one is built in part")
    arguments = parser.parse_args()
    wanted = None if arguments.ops is None else set(arguments.ops.split(","))
    tables = []
    for folder in (arguments.before, arguments.after):
        rows = artifacts(*read_bundle(folder))
        tables.append({row: found for row, found in rows.items() if wanted is None or row.split(" ")[0] in wanted})
    if arguments.common:
        common = tables[0].keys() & tables[1].keys()
        tables = [{row: found for row, found in rows.items() if row in common} for rows in tables]
    found = compare(*tables)
    for difference in found:
        print(f"{difference.row}: {difference.how}")
    print(json.dumps({"rows": len({*tables[0], *tables[1]}), "differ": len(found)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
