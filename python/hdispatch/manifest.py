"""The contract between the build wing and the serve wing: what a bundle holds.

A bundle is a folder:

    manifest.json         this module's `Manifest`, UTF-8 JSON
    manifest.sha256       the SHA-256 of manifest.json's bytes: `<64 hex digits>  manifest.json\\n`
    artifacts/<sha>.cubin each named by the SHA-256 of its bytes
    artifacts/functions.so  the host functions of every `tvm_ffi` record, if there is one

or that folder as one .tar.xz (archive.py). bundle_reader.py reads and verifies it.

Every file is listed in the manifest with size and SHA-256; a file that is not listed is ignored.

A bundle is code. `functions.so` is opened and called in the process that loads it, cubins run on its GPU: load bundles only
from whom you would take a Python package. The checksums in it tell damage, not who built it: anybody who changes a bundle can
write fitting ones. `load(DIR, sha256=…)` takes one manifest alone, and by that all of its files: note its digest, which
`hdispatch build` and `hdispatch inspect` print, where you trust it.

Changing a field's meaning, adding a required field or an operator raises `SCHEMA_VERSION`; readers accept their own
version only.

Expressions are postfix lists over integers, e.g. `["M", 15, "+", 16, "//"]`. Leaves: an int; a symbol `M`, `K`, `N`;
`<arg>.size(i)` or `<arg>.stride(i)` of a tensor argument (elements, not bytes); the name of an integer argument.
Operators, on 64-bit integers, floor division and modulo as Python's: `+ - * // % min max == != < <= > >= and or`.
Comparisons and logic give 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict

from .errors import BundleError
from .ladders import Ladders

SCHEMA_VERSION = 4
MANIFEST_NAME = "manifest.json"
CHECKSUM_NAME = "manifest.sha256"
#: Beside them in a bundle of candidates: see `hdispatch.tune.candidates`.
CANDIDATES_NAME = "candidates.json"
ARTIFACTS = "artifacts"
LIBRARY = f"{ARTIFACTS}/functions.so"

#: Bytes of a manifest that are read at most: some 200,000 rows.
MAX_MANIFEST = 256 * 2**20

Expr = list[int | str]
#: Classes of M for which Triton compiles different code: M == 1; M % 16 == 0; any other M.
MClass = Literal["one", "mult16", "other"]
M_CLASSES: tuple[MClass, ...] = ("one", "mult16", "other")


def class_of(m: int) -> MClass:
    """The class of M, as the launcher tells it (csrc/record.h)."""
    return "one" if m == 1 else "mult16" if m % 16 == 0 else "other"


#: Element types of a TMA descriptor, in the order of the driver's CUtensorMapDataType.
TENSOR_MAP_TYPES = (
    "uint8",
    "uint16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "float32",
    "float64",
    "bfloat16",
    "float32_ftz",
    "tfloat32",
    "tfloat32_ftz",
)


#: Bytes of an element of each dtype that an op takes.
DTYPE_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


class TensorMap(TypedDict):
    """A TMA descriptor of a tensor argument. Outermost dimension first, the innermost one's stride is 1.

    type     one of TENSOR_MAP_TYPES
    shape    elements in each dimension
    strides  elements between neighbours in each dimension but the last; a multiple of 16 bytes, else the guard fails
    box      elements in each dimension that one copy moves, 1 to 256
    swizzle  bytes: 0, 32, 64 or 128
    fill     what is read outside of the tensor: zero or nan
    """

    type: str
    shape: list[Expr]
    strides: list[Expr]
    box: list[int]
    swizzle: int
    fill: Literal["zero", "nan"]


class Param(TypedDict):
    """One parameter of the kernel, in the order of its signature, before a class drops any.

    kind   ptr; i1 i8 i16 i32 i64 (signed two's complement, i1 is one byte 0 or 1); f32 f64; tensor_map (128 bytes)
    arg    ptr, tensor_map: the tensor argument, ptr: or the workspace; f32, f64: the float argument, unless `const` is given
    offset ptr, tensor_map: bytes past the tensor's data pointer, default 0
    align  ptr only: the address that is passed is a multiple of this many bytes, else the guard fails; 1 if not assumed
    value  integers only
    const  f32, f64 only: a compile-time constant
    map    tensor_map only; the address is a multiple of 16 bytes, else the guard fails
    """

    kind: Literal["ptr", "i1", "i8", "i16", "i32", "i64", "f32", "f64", "tensor_map"]
    arg: NotRequired[str]
    offset: NotRequired[Expr]
    align: NotRequired[int]
    value: NotRequired[Expr]
    const: NotRequired[float]
    map: NotRequired[TensorMap]


class Guard(TypedDict):
    """A fact that the record assumes: `expr` is not 0. `text` says it in terms of the call: `input.stride(0) % 16 == 0`."""

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


class RecordHead(TypedDict):
    """Fields of every record. It is valid for m_min <= M <= m_max and where all guards hold; rows share records.

    second_min and second_max are given for an op with a second ladder, and bound the value of its integer likewise.

    early lists the tensor arguments that code with `pdl` may read before it waits for its predecessors; none if it is
    missing. Code without early reads waits before it releases its dependents.
    """

    backend: str
    kernel: str
    config: dict[str, Any]
    m_min: int
    m_max: int
    second_min: NotRequired[int]
    second_max: NotRequired[int]
    guards: list[Guard]
    early: NotRequired[list[str]]


class CubinRecord(RecordHead):
    """A kernel in cubins: grid and parameters as expressions in a call's sizes, and the code.

    Grid entries must be at least 1 for M >= 1.
    """

    launcher: Literal["cubin"]
    grid: list[Expr]
    params: list[Param]
    cubins: dict[MClass, Cubin]


class FfiArg(TypedDict):
    """One argument of a host function with TVM FFI's ABI, in the order of its signature. All of them are passed.

    kind   tensor: a DLTensor of the call's tensor: its address, device, dtype, sizes and strides, byte_offset 0. What the op
                   declares is applied: a flat tensor is 1-D, a padded one has its full rank, and the stride of a dimension
                   of size 0 or 1 is that of a contiguous tensor
           none    what an absent optional argument, or one that was None when the function was compiled, takes
           int bool float
           str     the constant `text`, as a C string
           stream  the stream, as an opaque pointer; at most one
           pdl     an int: 1 if the record says that its kernels wait themselves (`pdl`) and the bundle is loaded with pdl
    arg    tensor: the tensor argument, or the workspace, which every variant of the record's rows has; float: the float
           argument, unless `const` is given
    align  tensor: the address is a multiple of this many bytes, else the guard fails; 1 if not assumed
    dims   tensor: which of its dimensions are passed, in this order; default all. [1, 0] is the transposed view
    dtype  tensor: passed as this type of the same size, `uint8` for `float8_e4m3fn`, say; default its own
    value  int and bool
    const  float: a constant
    text   str: a constant without NUL
    """

    kind: Literal["tensor", "none", "int", "bool", "float", "stream", "pdl", "str"]
    arg: NotRequired[str]
    align: NotRequired[int]
    dims: NotRequired[list[int]]
    dtype: NotRequired[str]
    value: NotRequired[Expr]
    const: NotRequired[float]
    text: NotRequired[str]


class FfiRecord(RecordHead):
    """A host function with TVM FFI's ABI, which launches kernels itself: `__tvm_ffi_<function>` of a shared library.

    The name holds a hash of all that went into it. The function tests its arguments too, but its errors are errors: whatever
    a call may have is in the key, the guards and `align`. It is never called with M = 0.

    pdl         its kernels wait for their predecessors themselves, so that they may be launched early
    env_stream  it takes the stream from TVMFFIEnvGetStream and not as an argument
    """

    launcher: Literal["tvm_ffi"]
    file: str
    function: str
    args: list[FfiArg]
    pdl: bool
    env_stream: bool


Record = CubinRecord | FfiRecord


def artifacts_of(record: Record) -> list[str]:
    """The files that a record needs, each once."""
    if record["launcher"] == "tvm_ffi":
        return [record["file"]]
    return sorted({cubin["file"] for cubin in record["cubins"].values()})


class Tuned(TypedDict):
    """Measurements of tuning: µs of a launch of the row's kernel at its bucket's upper edge, the mean of one in a CUDA graph
    and one in a stream; and of the best kernel of each other backend that took part.
    """

    us: float
    others: dict[str, float]


class Row(TypedDict):
    """One row of the launch table: a key and the record that serves it. `bucket` is an index into the op's ladder; of an op
    with a second ladder, that index times the second's number of edges, plus an index into the second.

    A K or N of 0 stands for every size of it, where the op has that size: such a row serves what no exact one does.

    build_seconds is what generating and compiling the row's record took (shared with the rows of the same record),
    bytes the size of its artifacts; tuned what was measured, for rows whose kernel was.
    """

    op: str
    variant: str
    K: int
    N: int
    bucket: int
    record: int
    build_seconds: float
    bytes: int
    tuned: NotRequired[Tuned]


class SecondLadder(TypedDict):
    """The buckets of an integer argument, beside those of M."""

    arg: str
    ladder: list[int]


class Workspace(TypedDict):
    """Memory of the runtime's, one block per device and stream: by what name records take it, as a tensor of bytes, and how
    many bytes each variant asks for.
    """

    arg: str
    bytes: dict[str, int]


class OpEntry(TypedDict):
    """An op as it was when the bundle was built. Loading compares it with the installed op.

    second is given for an op with a second ladder, workspace for one whose kernels take memory of the runtime's.
    """

    schema: str
    ladder: list[int]
    second: NotRequired[SecondLadder]
    workspace: NotRequired[Workspace]
    #: variant name -> argument name -> dtype name, `float8_e4m3fn`, or compiled-in value; absent arguments are missing
    variants: dict[str, dict[str, str | int]]


def ladders_of(entry: OpEntry) -> Ladders:
    """The buckets of an op in a bundle."""
    second = entry.get("second")
    if second is None:
        return Ladders(tuple(entry["ladder"]))
    return Ladders(tuple(entry["ladder"]), second["arg"], tuple(second["ladder"]))


class Target(TypedDict):
    """The GPU that the code was compiled for."""

    name: str
    arch: str
    compute_capability: list[int]
    sm_count: int
    shared_memory: int


class Host(TypedDict):
    """Target of the host functions of a shared library: the CPU of the machine that built it.

    machine   platform.machine(): "x86_64"
    features  instruction sets that the code may use, by their names in /proc/cpuinfo: "avx2", "avx512f", …
    """

    machine: str
    features: list[str]


class FileEntry(TypedDict):
    """A file of the bundle."""

    sha256: str
    size: int


class Recorded(TypedDict):
    """A specialization of a Triton kernel that a run compiled and recorded, compiled again for the target (recorded.py).

    kernel       the function: module and name in it, joined by a dot
    source_hash  Triton's own hash of its source and of the functions and constants that it uses
    key          what Triton keeps the compiled kernel by: types and properties of the arguments, constants, options
    parameters   their names in the function's order
    signature, constants, attrs, options   of the compilation, as the recording has them (recording.py)
    file         its cubin
    metadata     Triton's, as its JSON: name of the entry point, num_warps, num_ctas, shared, scratch sizes, …
    """

    kernel: str
    source_hash: str
    key: str
    parameters: NotRequired[list[str]]
    signature: dict[str, Any]
    constants: list[Any]
    attrs: list[Any]
    options: dict[str, Any]
    file: str
    metadata: str


class Refused(TypedDict):
    """A specialization that Triton's compiler refuses, as it did in the run that was recorded (recorded.py).

    kernel, source_hash, key   see `Recorded`
    error                      the name of what it raises, one of `recorder.REFUSALS`
    message                    its text
    """

    kernel: str
    source_hash: str
    key: str
    error: str
    message: str


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
    #: given if a record is of a shared library
    host: NotRequired[Host]
    #: given if the bundle was built of a recording
    recorded: NotRequired[list[Recorded]]
    #: given if the recording has specializations that no compiler made
    recorded_refused: NotRequired[list[Refused]]
    #: what those were compiled with, as in `tools`: they may have been added to a bundle that another Triton made
    recorded_tools: NotRequired[dict[str, str]]


def check_views(where: str, args: Sequence[FfiArg], given: Mapping[str, str | int]) -> None:
    """Raise `BundleError` for a tensor that a function is passed as a type of another size than it has.

    given  argument name -> dtype name, of the variant that is called: `OpEntry.variants`
    """
    for arg in args:
        dtype, own = arg.get("dtype"), given.get(arg.get("arg", ""))
        if dtype is None or not isinstance(own, str):
            continue
        if DTYPE_BYTES.get(dtype) != DTYPE_BYTES.get(own):
            raise BundleError(
                f"{where} is passed {arg.get('arg')}, of {own}, as {dtype}; it takes one of "
                f"{', '.join(name for name, size in DTYPE_BYTES.items() if size == DTYPE_BYTES.get(own))}"
            )
