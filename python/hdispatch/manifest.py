"""The contract between the build wing and the serve wing: what a bundle holds, how it is written, read and verified.

A bundle is a folder:

    manifest.json         this module's `Manifest`, UTF-8 JSON
    manifest.sha256       the SHA-256 of manifest.json's bytes: `<64 hex digits>  manifest.json\\n`
    artifacts/<sha>.cubin each named by the SHA-256 of its bytes

Every file is listed in the manifest with size and SHA-256; a file that is not listed is ignored. Reading verifies all of
it before anything is loaded. The format holds data only: no pickle, no code.

Changing a field's meaning, adding a required field or an operator raises `SCHEMA_VERSION`; readers accept their own
version only.

Expressions are postfix lists over integers, e.g. `["M", 15, "+", 16, "//"]`. Leaves: an int; a symbol `M`, `K`, `N`;
`<arg>.size(i)` or `<arg>.stride(i)` of a tensor argument (elements, not bytes). Operators, on 64-bit integers, floor
division and modulo as Python's: `+ - * // % min max == != < <= > >= and or`. Comparisons and logic give 0 or 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from .errors import BundleError

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.sha256"
ARTIFACTS = "artifacts"

Expr = list[int | str]
#: Classes of M for which Triton compiles different code: M == 1; M % 16 == 0; any other M.
MClass = Literal["one", "mult16", "other"]
M_CLASSES: tuple[MClass, ...] = ("one", "mult16", "other")


class Param(TypedDict):
    """One parameter of the kernel, in the order of its signature, before a class drops any.

    kind   ptr; i1 i8 i16 i32 i64 (signed two's complement, i1 is one byte 0 or 1); f32 f64
    arg    ptr: the tensor argument; f32, f64: the float argument, unless `const` is given
    offset ptr only: bytes past the tensor's data pointer, default 0
    align  ptr only: the address that is passed is a multiple of this many bytes, else the guard fails; 1 if not assumed
    value  integers only
    const  f32, f64 only: a compile-time constant
    """

    kind: Literal["ptr", "i1", "i8", "i16", "i32", "i64", "f32", "f64"]
    arg: NotRequired[str]
    offset: NotRequired[Expr]
    align: NotRequired[int]
    value: NotRequired[Expr]
    const: NotRequired[float]


class Guard(TypedDict):
    """A fact that the record assumes: `expr` is not 0. `text` says it in words of the call, e.g. `input.stride(0) % 16 == 0`."""

    expr: Expr
    text: str


class Cubin(TypedDict):
    """The code for one class of M and how to launch it.

    params lists the indices of the record's params that this code still takes (a value of 1 is folded into the code);
    Triton's two hidden scratch pointers follow them and are passed as null. Blocks have 32 * num_warps threads. The
    grid is the record's, its first dimension times the first of `cluster`.
    """

    file: str
    function: str
    params: list[int]
    num_warps: int
    shared_bytes: int
    cluster: list[int]
    cooperative: bool
    pdl: bool


class Record(TypedDict):
    """Grid, parameters and guards as expressions in a call's sizes, and the code. Shared by the rows that it serves.

    It is valid for m_min <= M <= m_max and where all guards hold. Grid entries must be at least 1 for M >= 1.
    """

    backend: str
    kernel: str
    config: dict[str, Any]
    m_min: int
    m_max: int
    grid: list[Expr]
    params: list[Param]
    guards: list[Guard]
    cubins: dict[MClass, Cubin]


class Row(TypedDict):
    """One row of the launch table: a key and the record that serves it. `bucket` is an index into the op's ladder.

    build_seconds is what generating and compiling the row's record took (shared with the rows of the same record),
    bytes the size of its artifacts.
    """

    op: str
    variant: str
    K: int
    N: int
    bucket: int
    record: int
    build_seconds: float
    bytes: int


class OpEntry(TypedDict):
    """An op as it was when the bundle was built. Loading compares it with the installed op."""

    schema: str
    ladder: list[int]
    #: variant name -> argument name -> dtype name, `float8_e4m3fn`; absent optional arguments are missing
    variants: dict[str, dict[str, str]]


class Target(TypedDict):
    """The GPU that the code was compiled for."""

    name: str
    arch: str
    compute_capability: list[int]
    sm_count: int
    shared_memory: int


class FileEntry(TypedDict):
    """A file of the bundle."""

    sha256: str
    size: int


class Manifest(TypedDict):
    """The whole of manifest.json."""

    schema_version: int
    hdispatch: str
    target: Target
    tools: dict[str, str]
    ops: dict[str, OpEntry]
    files: dict[str, FileEntry]
    records: list[Record]
    rows: list[Row]
