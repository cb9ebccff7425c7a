"""`hdispatch inspect`: what a bundle holds, on any machine."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..bundle_reader import read_files
from ..errors import BundleError, HdispatchError
from ..manifest import (
    MANIFEST_NAME,
    Cubin,
    CubinRecord,
    Expr,
    FfiArg,
    FfiRecord,
    Manifest,
    Param,
    TensorMap,
    Tuned,
    artifacts_of,
    ladders_of,
)
from . import kernels
from .numbers import whole
from .text import count, print_json, size, table

DESCRIPTION = """\
Verify a bundle (every checksum) and print its rows. Needs no GPU and loads nothing. With --kernels the ops of these packages
must be declared as the bundle has them.

  hdispatch inspect bundle                          totals and every row
  hdispatch inspect bundle --op rms_norm_dynamic_per_token_quant
  hdispatch inspect bundle --row 17                 one row with its whole record: grid, parameters, guards, code

A row serves the calls of one op and variant with exactly this K and N and an M in this range. It launches a cubin, or calls
a host function with TVM FFI's ABI, which has no warps and no shared memory here. Columns: shared is dynamic shared memory in
bytes; pdl: the kernel waits for its predecessors itself, so that it may be launched while they still
run; guards: facts tested on every call, besides M and alignment; bytes and seconds are those of the row's record, which
other rows may share; µs: what tuning measured at the bucket's upper edge; against: by which factor the best kernel of each
other backend took longer there.
"""


def add_parser(commands: Any) -> None:
    """Declare the subcommand."""
    parser = commands.add_parser(
        "inspect",
        help="print a bundle's rows; no GPU needed",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="DIR", type=Path, help="folder of the bundle")
    parser.add_argument("--op", metavar="NAME", help="only rows of this op")
    kernels.add_argument(parser)
    parser.add_argument("--row", metavar="N", type=whole, help="one row, by its number, with its whole record")
    parser.add_argument(
        "--sha256", metavar="DIGEST", help="the digest that the manifest must have; any other bundle is refused"
    )
    parser.add_argument("--json", action="store_true", help="print JSON on stdout")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print rows, or one row."""
    manifest, sha256, *_ = read_files(arguments.bundle, sha256=arguments.sha256)
    _check_declared(manifest, arguments)
    if arguments.op is not None and arguments.op not in manifest["ops"]:
        raise HdispatchError(f"{arguments.bundle} has no op {arguments.op!r}; it has {', '.join(sorted(manifest['ops']))}")
    if arguments.row is not None:
        return _run_row(manifest, arguments)
    numbers = [i for i, row in enumerate(manifest["rows"]) if arguments.op in (None, row["op"])]
    if arguments.json:
        print_json({"bundle": str(arguments.bundle), "sha256": sha256, **to_json(manifest, numbers)})
    else:
        print(describe(arguments.bundle, sha256, manifest, numbers))
    return 0


def _check_declared(manifest: Manifest, arguments: argparse.Namespace) -> None:
    """`BundleError` where an op of --kernels is another in the bundle."""
    from .. import registry

    for name in kernels.define(arguments):
        if name in manifest["ops"]:
            registry.spec(name).check_same(manifest["ops"][name], arguments.bundle / MANIFEST_NAME, "rebuild")


def _run_row(manifest: Manifest, arguments: argparse.Namespace) -> int:
    count = len(manifest["rows"])
    if not 0 <= arguments.row < count:
        raise HdispatchError(f"{arguments.bundle} has no row {arguments.row}; it has rows 0 to {count - 1}")
    if arguments.json:
        row = manifest["rows"][arguments.row]
        print_json({**_row_facts(manifest, arguments.row), "record": manifest["records"][row["record"]]})
    else:
        print(describe_row(manifest, arguments.row))
    return 0


# ---- all rows ----


def to_json(manifest: Manifest, numbers: Sequence[int]) -> dict[str, Any]:
    """The bundle and these of its rows as plain data."""
    return {
        "target": manifest["target"],
        "tools": {"hdispatch": manifest["hdispatch"], **manifest["tools"]},
        "ops": manifest["ops"],
        "recorded": dict(_recorded(manifest)),
        "recorded_refused": dict(_recorded(manifest, "recorded_refused")),
        "rows": [_row_facts(manifest, number) for number in numbers],
        "totals": totals(manifest, numbers),
    }


def _row_facts(manifest: Manifest, number: int) -> dict[str, Any]:
    """A row's cells in the table."""
    row = manifest["rows"][number]
    record = manifest["records"][row["record"]]
    ladders = ladders_of(manifest["ops"][row["op"]])
    first, last = ladders.bounds(row["bucket"])
    second_first, second_last = ladders.second_bounds(row["bucket"]) if ladders.arg else (0, None)
    cubins = list(record["cubins"].values()) if record["launcher"] == "cubin" else []
    return {
        "row": number,
        "op": row["op"],
        "variant": row["variant"],
        "K": row["K"],
        "N": row["N"],
        "m_first": first,
        "m_last": last,
        **({"second": {"arg": ladders.arg, "first": second_first, "last": second_last}} if ladders.arg else {}),
        "record": row["record"],
        "launcher": record["launcher"],
        "backend": record["backend"],
        "kernel": record["kernel"],
        "warps": sorted({cubin["num_warps"] for cubin in cubins}),
        "shared_bytes": sorted({cubin["shared_bytes"] for cubin in cubins}),
        "pdl": record["pdl"] if record["launcher"] == "tvm_ffi" else all(cubin["pdl"] for cubin in cubins),
        "guards": [guard["text"] for guard in record["guards"]],
        "bytes": row["bytes"],
        "build_seconds": row["build_seconds"],
        "tuned": row.get("tuned"),
    }


def totals(manifest: Manifest, numbers: Sequence[int]) -> dict[str, Any]:
    """Sums over rows; records, their code and their build time count once, however many rows share them."""
    rows = [manifest["rows"][number] for number in numbers]
    records = {row["record"]: row["build_seconds"] for row in rows}
    used = [manifest["records"][record] for record in records]
    functions = sum(record["launcher"] == "tvm_ffi" for record in used)
    files = {name for record in used for name in artifacts_of(record)}
    return {
        "rows": len(rows),
        "records": len(records),
        "cubins": len({name for record in used if record["launcher"] == "cubin" for name in artifacts_of(record)}),
        "functions": functions,
        "bytes": sum(manifest["files"][name]["size"] for name in files),
        "build_seconds": round(sum(records.values()), 3),
    }


def describe(folder: Path, sha256: str, manifest: Manifest, numbers: Sequence[int]) -> str:
    """The bundle and the chosen rows as text."""
    target = manifest["target"]
    counts = {op: sum(manifest["rows"][number]["op"] == op for number in numbers) for op in manifest["ops"]}
    shared = size(target["shared_memory"])
    lines = [
        f"{folder}: every checksum holds",
        f"sha256  {sha256}",
        f"target  {target['name']}: {target['arch']}, {target['sm_count']} SMs, {shared} shared memory per block",
        f"tools   hdispatch {manifest['hdispatch']}, {_tools(manifest['tools'])}",
        *(f"op      {manifest['ops'][op]['schema']}: {count(rows, 'row')}" for op, rows in counts.items() if rows),
        *([f"        recorded kernels: {_tools(manifest['recorded_tools'])}"] if "recorded_tools" in manifest else []),
        *(f"triton  {kernel}: {count(each, 'recorded specialization')}" for kernel, each in _recorded(manifest).items()),
        *(f"triton  {kernel}: {_refused(number)}" for kernel, number in _recorded(manifest, "recorded_refused").items()),
        "",
        table(HEADER, [_cells(_row_facts(manifest, number)) for number in numbers], left=4),
        "",
        describe_totals(totals(manifest, numbers)),
    ]
    return "\n".join(lines)


def _tools(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _recorded(manifest: Manifest, field: Literal["recorded", "recorded_refused"] = "recorded") -> Counter[str]:
    """How many specializations of each recorded kernel there are, with code or refused."""
    return Counter(entry["kernel"] for entry in manifest.get(field, []))


def _refused(number: int) -> str:
    return f"{count(number, 'recorded specialization')} that the compiler refuses"


HEADER = (
    *("row", "op", "variant", "kernel", "K", "N", "M"),
    *("warps", "shared", "pdl", "guards", "bytes", "seconds", "µs", "against"),
)


def _cells(facts: dict[str, Any]) -> list[str]:
    return [
        str(facts["row"]),
        facts["op"],
        facts["variant"],
        facts["kernel"].removeprefix(f"hdispatch.kernels.{facts['op']}."),
        *(str(facts[symbol]) if facts[symbol] else "-" for symbol in ("K", "N")),
        words_of_bucket(facts),
        _each(facts["warps"]) or "-",
        _each(facts["shared_bytes"]) or "-",
        "yes" if facts["pdl"] else "no",
        str(len(facts["guards"])),
        str(facts["bytes"]),
        f"{facts['build_seconds']:.2f}",
        f"{facts['tuned']['us']:.2f}" if facts["tuned"] else "-",
        words_of_others(facts["tuned"]),
    ]


def words_of_others(tuned: Tuned | None) -> str:
    """`triton 1.18 ×`; a dash where nothing else was measured."""
    if tuned is None or not tuned["others"]:
        return "-"
    return ", ".join(f"{name} {us / tuned['us']:.2f} ×" for name, us in tuned["others"].items())


def _each(values: Sequence[int]) -> str:
    return "/".join(map(str, values))


def words_of_range(first: int, last: int | None) -> str:
    """`9..16`, `1`, `4097..`."""
    return f"{first}.." if last is None else str(first) if first == last else f"{first}..{last}"


def words_of_bucket(facts: dict[str, Any]) -> str:
    """`9..16`; of an op with a second ladder `9..16, max_seq_len 129..512`."""
    words = words_of_range(facts["m_first"], facts["m_last"])
    second = facts.get("second")
    return words if second is None else f"{words}, {second['arg']} {words_of_range(second['first'], second['last'])}"


def describe_totals(sums: dict[str, Any]) -> str:
    """The totals as text."""
    names = ("rows", "records", "cubins", "functions") if sums["functions"] else ("rows", "records", "cubins")
    counts = ", ".join(count(sums[name], name[:-1]) for name in names)
    return f"{counts}, {size(sums['bytes'])}, {sums['build_seconds']:.1f} s of generating and compiling"


# ---- one row ----


def describe_row(manifest: Manifest, number: int) -> str:
    """A row and its whole record as text."""
    row, facts = manifest["rows"][number], _row_facts(manifest, number)
    record = manifest["records"][row["record"]]
    sizes = ", ".join(f"{symbol} = {facts[symbol]}" for symbol in ("K", "N") if facts[symbol]) or "any size"
    config = ", ".join(f"{name}={value!r}" for name, value in record["config"].items())
    sharing = sum(each["record"] == row["record"] for each in manifest["rows"])
    lines = [
        f"row {number}: {row['op']}, {row['variant']}, {sizes}, M {words_of_bucket(facts)}",
        f"record  {row['record']}, which serves {count(sharing, 'row')}",
        f"kernel  {record['kernel']} by {record['backend']}",
        f"config  {config or '(none)'}",
        f"valid   {record['m_min']} <= M <= {record['m_max']}",
        *(
            [f"        {record['second_min']} <= {facts['second']['arg']} <= {record['second_max']}"]
            if "second" in facts
            else []
        ),
        *(_inputs_of_cubins(record) if record["launcher"] == "cubin" else _inputs_of_function(record)),
        "guards" if record["guards"] else "guards  (none)",
        *(f"  {guard['text']}" for guard in record["guards"]),
        *([f"early   {', '.join(record['early'])}: may be read before the wait"] if record.get("early") else []),
        "code",
        *(_code_of_cubins(record, manifest) if record["launcher"] == "cubin" else _code_of_function(record, manifest)),
        f"build   {row['build_seconds']:.2f} s, {size(row['bytes'])}",
        *([f"tuned   {tuned['us']:.2f} µs; {words_of_others(tuned)}"] if (tuned := row.get("tuned")) else []),
    ]
    return "\n".join(lines)


def _inputs_of_cubins(record: CubinRecord) -> list[str]:
    return [
        f"grid    {' x '.join(words_of(entry) for entry in record['grid'])}",
        "params",
        *(f"  {index:2} {_words_of_param(param)}" for index, param in enumerate(record["params"])),
    ]


def _code_of_cubins(record: CubinRecord, manifest: Manifest) -> list[str]:
    words = (_words_of_cubin(m_class, cubin, record, manifest) for m_class, cubin in record["cubins"].items())
    return [f"  {line}" for lines in words for line in lines]


def _inputs_of_function(record: FfiRecord) -> list[str]:
    return ["args", *(f"  {index:2} {_words_of_ffi_arg(arg, record)}" for index, arg in enumerate(record["args"]))]


def _code_of_function(record: FfiRecord, manifest: Manifest) -> list[str]:
    stream = ", stream in TVM FFI's environment" if record["env_stream"] else ""
    host = manifest.get("host", {"machine": "?", "features": []})
    return [
        f"  host function {record['function']}{', pdl' if record['pdl'] else ''}{stream}",
        f"    {record['file']}, {size(manifest['files'][record['file']]['size'])} with all others, for {host['machine']} with "
        f"{', '.join(host['features'])}",
    ]


def _words_of_ffi_arg(arg: FfiArg, record: FfiRecord) -> str:
    kind = arg["kind"]
    if kind == "tensor":
        words = f"tensor {arg['arg']}"
        words += f"[dimensions {', '.join(map(str, arg['dims']))}]" if "dims" in arg else ""
        words += f" as {arg['dtype']}" if "dtype" in arg else ""
        return words + (f", a multiple of {arg['align']} bytes" if arg.get("align", 1) > 1 else "")
    if kind in ("int", "bool"):
        return f"{kind:6} {words_of(arg['value'])}"
    if kind == "str":
        return f"{kind:6} {arg['text']!r}"
    if kind == "float":
        return f"{kind:6} {arg['const'] if 'const' in arg else arg['arg']}"
    if kind == "pdl":
        return "pdl    1 where the bundle is loaded with pdl" if record["pdl"] else "pdl    0"
    return kind


def _words_of_param(param: Param) -> str:
    kind = param["kind"]
    if kind in ("ptr", "tensor_map"):
        offset = words_of(param["offset"]) if "offset" in param else "0"
        where = param["arg"] + (f" + {offset} bytes" if offset != "0" else "")
        if kind == "tensor_map":
            return f"map  {where}: {_words_of_map(param['map'])}"
        return f"ptr  {where}" + (f", a multiple of {param['align']} bytes" if param.get("align", 1) > 1 else "")
    if "const" in param:
        return f"{kind:4} {param['const']}"
    return f"{kind:4} {param['arg'] if 'arg' in param else words_of(param['value'])}"


def _words_of_map(made: TensorMap) -> str:
    shape, strides = (", ".join(map(words_of, made[name])) for name in ("shape", "strides"))
    box = " x ".join(map(str, made["box"]))
    return f"{made['type']} [{shape}], strides [{strides + ', ' if strides else ''}1], box {box}, swizzle {made['swizzle']}"


M_CLASS_WORDS = {"one": "M = 1", "mult16": "M a multiple of 16", "other": "any other M"}


def _words_of_cubin(m_class: str, cubin: Cubin, record: CubinRecord, manifest: Manifest) -> list[str]:
    dropped = sorted(set(range(len(record["params"]))) - set(cubin["params"]))
    extras = [f"cluster {_each(cubin['cluster'])}"] if cubin["cluster"] != [1, 1, 1] else []
    extras += ["cooperative"] if cubin["cooperative"] else []
    extras += ["pdl"] if cubin["pdl"] else []
    extras += [f"params {', '.join(map(str, dropped))} compiled in"] if dropped else []
    facts = [f"{cubin['num_warps']} warps", f"{cubin['shared_bytes']} bytes shared", *extras]
    entry = manifest["files"][cubin["file"]]
    return [
        f"{M_CLASS_WORDS.get(m_class, m_class)}: {cubin['function']}, {', '.join(facts)}",
        f"  {cubin['file']}, {size(entry['size'])}",
    ]


def words_of(expr: Expr) -> str:
    """A postfix expression as people write it: ["M", 15, "+", 16, "//"] -> (M + 15) // 16. BundleError for anything else."""
    stack: list[str] = []
    try:
        for token in expr:
            if isinstance(token, str) and token in ("min", "max"):
                right, left = stack.pop(), stack.pop()
                stack.append(f"{token}({_bare(left)}, {_bare(right)})")
            elif isinstance(token, str) and token in OPERATORS:
                right, left = stack.pop(), stack.pop()
                stack.append(f"({left} {token} {right})")
            else:
                stack.append(str(token))
        (words,) = stack
    except (IndexError, ValueError):
        raise BundleError(f"an expression of {len(expr)} tokens leaves no single value: {str(expr)[:200]}") from None
    return _bare(words)


def _bare(words: str) -> str:
    """Without the outermost parentheses: only a whole operation begins with one."""
    return words[1:-1] if words.startswith("(") else words


OPERATORS = ("+", "-", "*", "//", "%", "==", "!=", "<", "<=", ">", ">=", "and", "or")
