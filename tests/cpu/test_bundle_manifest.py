"""Manifests that are refused, with which words, and that a refused one changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import hdispatch
import pytest
import toy
from hdispatch.manifest import MANIFEST_NAME
from toy_bundles import ONE, changed, serves

pytestmark = pytest.mark.usefixtures("nothing_loaded")


def add_row(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["rows"].append({**m["rows"][0], "K": 1024, **changes})


def record_set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0].update(changes)


def cubin_set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0]["cubins"]["other"].update(changes)


def param_set(index: int, **changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda m: m["records"][0]["params"].__setitem__(index, changes)


REFUSED = {
    "duplicate row": (add_row(K=64), "rows 0 and 20 have the same key"),
    "row of no record": (add_row(record=1), "row 20 names record 1 of 1"),
    "row of record -1": (add_row(record=-1), "row 20 names record -1 of 1"),
    "row of no op": (add_row(op="other"), "row 20 is of op 'other', which is not among the bundle's ops"),
    "row of no variant": (add_row(variant="other"), "row 20 is of variant 'other', which is not among those of toy"),
    "row of a variant that is not built": (add_row(variant="float16"), "'float16', which is not among those of toy"),
    "row of no bucket": (add_row(bucket=5), "row 20 names bucket 5 of 5"),
    "row of bucket -1": (add_row(bucket=-1), "row 20 names bucket -1 of 5"),
    "K too large": (add_row(K=2**32), "row 20: K = 4294967296, N = 0; sizes are below"),
    "N negative": (add_row(N=-1), "N = -1; sizes are below"),
    "K fractional": (add_row(K=64.0), r"rows\[20\].K is 64.0, of type float; it takes int"),
    "record is a flag": (add_row(record=False), r"rows\[20\].record is False, of type bool"),
    "extra byte of an int": (add_row(bytes=2**63), r"rows\[20\].bytes is .*; integers fit 64 bits"),
    "file is not listed": (lambda m: m["files"].pop(ONE), "kernel toy_kernel uses artifacts/one.cubin, which is not listed"),
    "file entry without size": (lambda m: m["files"][ONE].pop("size"), r"files\['artifacts/one.cubin'\].size is missing"),
    "no rows field": (lambda m: m.pop("rows"), "malformed: rows is missing"),
    "another op": (
        lambda m: m["ops"].update(other=m["ops"]["toy"]),
        "holds op 'other', which is not defined here: install the package",
    ),
    "another schema": (
        lambda m: m["ops"]["toy"].update(schema="toy(Tensor x) -> ()"),
        r"built for toy\(Tensor x\) -> \(\); the installed op is toy\(",
    ),
    "another variant": (lambda m: m["ops"]["toy"]["variants"].update(other={}), "with other variants or arguments"),
    "another dtype": (
        lambda m: m["ops"]["toy"]["variants"]["bfloat16"].update(scale="float64"),
        "with other variants or arguments",
    ),
    "ladder that descends": (lambda m: m["ops"]["toy"].update(ladder=[1, 4, 2, 8, 16]), "ladder edge 2 is 2"),
    "ladder from 0": (lambda m: m["ops"]["toy"].update(ladder=[0, 1, 2, 3, 4]), "ladder edge 0 is 0"),
    "too long a ladder": (lambda m: m["ops"]["toy"].update(ladder=list(range(1, 66))), "a ladder has 65 edges"),
    "unknown param kind": (
        param_set(4, kind="u32", value=["M"]),
        r"records\[0\].params\[4\].kind is 'u32'; it takes one of ptr, i1",
    ),
    "unknown argument": (param_set(0, kind="ptr", arg="nobody"), 'toy has no tensor argument "nobody"'),
    "float argument as pointer": (param_set(0, kind="ptr", arg="epsilon"), 'toy has no tensor argument "epsilon"'),
    "tensor argument as float": (param_set(5, kind="f32", arg="scale"), 'toy has no float argument "scale"'),
    "pointer of no argument": (param_set(0, kind="ptr"), 'field "arg" is missing'),
    "integer of no value": (param_set(4, kind="i32"), 'field "value" is missing'),
    "absent tensor": (param_set(0, kind="ptr", arg="residual"), "toy_kernel reads residual, which is None in variant bfloat16"),
    "absent tensor's stride": (param_set(4, kind="i32", value=["residual.stride(0)"]), "reads residual, which is None"),
    "dimension of no tensor": (
        param_set(4, kind="i32", value=["weight.size(1)"]),
        "reads dimension 1 of weight, which has rank 1",
    ),
    "constant that does not fit": (param_set(4, kind="i8", value=[300]), "param 4 is 300, which does not fit i8"),
    "alignment of 3": (param_set(0, kind="ptr", arg="result", align=3), "alignment 3 is not a power of two"),
    "negative alignment": (param_set(0, kind="ptr", arg="result", align=-1), 'field "align" is -1, of the wrong type'),
    "unknown token": (param_set(4, kind="i32", value=["M", "**"]), r'unknown token "\*\*"'),
    "unbalanced expression": (param_set(4, kind="i32", value=["M", "K"]), "expression of 2 tokens leaves 2 values"),
    "token that is a float": (param_set(4, kind="i32", value=[1.5]), r"value\[0\] is 1.5; it takes int \| str"),
    "grid of two": (record_set(grid=[[1], [1]]), "toy_kernel: grid has 2 dimensions; it takes 3"),
    "empty range of M": (record_set(m_min=4, m_max=3), r"valid for M in \[4, 3\], which is empty"),
    "no code": (record_set(cubins={}), "toy_kernel: the record has no code"),
    "unknown class": (
        lambda m: m["records"][0]["cubins"].update(two=m["records"][0]["cubins"]["one"]),
        r"cubins\['two'\] is 'two'; it takes one of one, mult16, other",
    ),
    "too many parameters": (
        record_set(params=[{"kind": "i32", "value": [1]}] * 63),
        "63 parameters; a record takes at most 62",
    ),
    "param that is not there": (cubin_set(params=[9]), "code takes param 9; the record has 9"),
    "params out of order": (cubin_set(params=[1, 0]), "takes param 0 after 1; params ascend"),
    "params that repeat": (cubin_set(params=[0] * 100), "takes param 0 after 0; params ascend"),
    "negative param": (cubin_set(params=[-1]), 'field "params" is .*, of the wrong type'),
    "no warps": (cubin_set(num_warps=0), "0 warps per block; it takes 1 to 32"),
    "too many warps": (cubin_set(num_warps=33), "33 warps per block"),
    "cluster of two": (cubin_set(cluster=[2, 1]), 'field "cluster" is .*, of the wrong type'),
    "cluster of 17": (cubin_set(cluster=[17, 1, 1]), "cluster 17x1x1; it takes 1 to 16 blocks"),
    "shared memory beyond the device": (
        cubin_set(shared_bytes=232449),
        "toy_kernel of kernel toy_kernel takes 232449 bytes of shared memory; a block of h200 has at most 232448",
    ),
    "N of an op without N": (param_set(4, kind="i32", value=["N"]), r'expression names "N", which toy does not have: toy\('),
    "N of an op without N in a guard": (
        record_set(guards=[{"expr": ["N", 16, "%", 0, "=="], "text": "N % 16 == 0"}]),
        'expression names "N", which toy does not have',
    ),
    "row of N of an op without N": (add_row(N=8), r"row of K = 1024, N = 8; toy has no N: toy\("),
    "a guard of a million tokens": (
        record_set(guards=[{"expr": [1, *[1, "and"] * 500_000], "text": "1"}]),
        "expression has 1000001 tokens; it takes at most 1024",
    ),
    "a million guards": (
        record_set(guards=[{"expr": [1], "text": "1"}] * 1_000_000),
        "toy_kernel: 1000000 guards; a record takes at most 256",
    ),
    "NUL in a function's name": (cubin_set(function="toy_kernel\0x"), r"function is 'toy_kernel\\x00x'; strings hold no NUL"),
    "NUL in a kernel's name": (record_set(kernel="\0"), r"kernel is '\\x00'; strings hold no NUL"),
    "NUL in a guard's text": (
        record_set(guards=[{"expr": [1], "text": "a\0"}]),
        r"guards\[0\].text is 'a\\x00'; strings hold no NUL",
    ),
    "a character at the cut": (
        param_set(4, kind="i32", **{"x" * n + "é" * 200: "é" for n in range(8)}),
        'field "value" is missing in',
    ),
    "flag that is a number": (cubin_set(pdl=1), r"cubins\['other'\].pdl is 1, of type int; it takes bool"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_manifests_that_are_refused(good, tmp_path, case):
    change, words = REFUSED[case]
    toy.write(tmp_path / "bad", changed(change))
    with pytest.raises(hdispatch.BundleError, match=words) as caught:
        hdispatch.load(tmp_path / "bad", driver="null")
    assert str(tmp_path / "bad" / MANIFEST_NAME) in str(caught.value)
    assert hdispatch.loaded() == [good]
    assert serves()


def test_a_record_of_two_ops(good, tmp_path):
    if "toy_twin" not in hdispatch.registry.names():
        hdispatch.registry.define(dataclasses.replace(toy.SPEC, name="toy_twin"))

    def share(manifest: dict[str, Any]) -> None:
        manifest["ops"]["toy_twin"] = {**manifest["ops"]["toy"], "schema": hdispatch.registry.spec("toy_twin").schema()}
        manifest["rows"].append({**manifest["rows"][0], "op": "toy_twin"})

    toy.write(tmp_path / "bad", changed(share))
    with pytest.raises(hdispatch.BundleError, match="row 20 of toy_twin names record 0, which is one of toy"):
        hdispatch.load(tmp_path / "bad", driver="null")
    assert serves()


def ffi_manifest(**argument: object) -> dict[str, Any]:
    """A function's record in the place of the cubins, with one argument."""

    def change(manifest: dict[str, Any]) -> None:
        head = {name: manifest["records"][0][name] for name in ("backend", "kernel", "config", "m_min", "m_max", "guards")}
        args = [{"kind": "tensor", "arg": "input", **argument}]
        code = {"file": ONE, "function": "f", "args": args, "pdl": False, "env_stream": False}
        manifest["records"][0] = {**head, **code, "launcher": "tvm_ffi"}
        manifest["host"] = {"machine": "x86_64", "features": []}

    return changed(change)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int16"])
def test_a_tensor_passed_as_another_type_of_its_size(good, tmp_path, dtype):
    toy.write(tmp_path / "a", ffi_manifest(dtype=dtype))
    hdispatch.load(tmp_path / "a", driver="null")
    assert serves()


@pytest.mark.parametrize("dtype", ["float32", "uint8", "float8_e4m3fn", "int64", "bool", "nonsense", ""])
def test_a_tensor_passed_as_a_type_of_another_size(good, tmp_path, dtype):
    toy.write(tmp_path / "a", ffi_manifest(dtype=dtype))
    words = f"row 0: toy_kernel is passed input, of bfloat16, as {dtype}; it takes one of float16, bfloat16, int16"
    with pytest.raises(hdispatch.BundleError, match=words):
        hdispatch.load(tmp_path / "a", driver="null")
    assert hdispatch.loaded() == [good]


def test_register_holds_a_type_against_the_argument_too():
    class Function:
        def __chandle__(self) -> int:
            raise AssertionError("it was taken")

    for dtype, own in (("float32", "bfloat16"), ("nonsense", "bfloat16")):
        args = [{"kind": "tensor", "arg": "input", "dtype": dtype}]
        with pytest.raises(
            hdispatch.BundleError, match=rf"\(registered\) is passed input, of {own}, as {dtype}; it takes one of"
        ):
            hdispatch.register("toy", hdispatch.Key("bfloat16"), Function(), args=args, driver="null")
    assert not hdispatch.registered()
