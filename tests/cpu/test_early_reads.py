"""What is read before the wait is not what a launch before may still write: through the null driver, and at build and load."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hdispatch
import pytest
import torch
import toy
from hdispatch.bundle_reader import read_bundle
from hdispatch.cli import inspect
from hdispatch.compile import Selection, build
from hdispatch.errors import BuildError
from hdispatch.testing import null

#: Every argument has its own memory: each begins this many bytes after the one before.
PAGE = 2**16


def with_early(names: Any) -> dict[str, Any]:
    """The toy's bundle: rows for K = 64 read nothing early, those for K = 512 these arguments."""
    made = toy.manifest()
    made["records"].append({**toy.record(), "early": names})
    for row in made["rows"]:
        row["record"] = int(row["K"] == 512)
    return made


@pytest.fixture
def loaded(tmp_path):
    bundle = hdispatch.load(toy.write(tmp_path, with_early(["weight"])), driver="null")
    yield bundle
    bundle.unload()


@pytest.fixture
def memory() -> Callable[..., torch.Tensor]:
    """Makes tensors at given pages of one block of memory."""
    block = torch.zeros(64 * PAGE, dtype=torch.uint8)

    def at(page: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return block[page * PAGE :].view(dtype)[: torch.Size(shape).numel()].view(shape)

    return at


def arguments(memory: Callable[..., torch.Tensor], k: int, page: int, weight: int, m: int = 8) -> list[Any]:
    """A call that writes result, scale and residual at pages `page`, + 1 and + 2."""
    half = torch.bfloat16
    return [
        memory(page, (m, k), torch.float8_e4m3fn),
        memory(60, (m, k), half),
        memory(weight, (k,), half),
        memory(page + 1, (m, 1), torch.float32),
        1e-6,
        memory(61, (1,), torch.float32),
        memory(page + 2, (m, k), half),
    ]


def attributes(calls: list[list[Any]], door: Callable[..., object] = toy.OP) -> list[bool]:
    """For each call whether it was launched with the PDL attribute."""
    with null.recording(), hdispatch.strict():
        for args in calls:
            door(*args)
    return [launch["pdl"] for launch in null.launches()]


@pytest.mark.parametrize("door", [toy.OP, torch.ops.hdispatch.toy, torch.ops.hdispatch.toy.default])
def test_quantize_then_multiply(loaded, memory, door):
    for page in (10, 11, 12):  # each of the outputs
        quantize, multiply = arguments(memory, 64, 10, 50), arguments(memory, 512, 20, page)
        assert attributes([quantize, multiply, multiply], door) == [True, False, True]
    for page in (9, 13):
        assert attributes([arguments(memory, 64, 10, 50), arguments(memory, 512, 20, page)], door) == [True, True]


def test_only_what_is_read_early_matters(loaded, memory):
    quantize, multiply = arguments(memory, 64, 10, 50), arguments(memory, 512, 20, 50)
    multiply[1] = memory(10, (8, 512), torch.bfloat16)  # the input: read after the wait
    assert attributes([quantize, multiply]) == [True, True]
    other = arguments(memory, 64, 20, 10)  # reads `weight` after the wait
    assert attributes([quantize, other]) == [True, True]


def test_a_chain_that_releases_before_it_waits(loaded, memory):
    quantize = arguments(memory, 64, 10, 50)
    chain = [arguments(memory, 512, page, 50) for page in (20, 30)]
    last = arguments(memory, 512, 40, 10)
    assert attributes([quantize, *chain, last, last]) == [True, True, True, False, True]
    # A kernel that waits first ends what is before it.
    assert attributes([quantize, chain[0], arguments(memory, 64, 30, 50), last]) == [True] * 4


def test_no_rows_write_nothing(loaded, memory):
    quantize, multiply = arguments(memory, 64, 10, 50), arguments(memory, 512, 20, 10)
    assert attributes([quantize, arguments(memory, 64, 30, 50, m=0), multiply]) == [True, False]
    assert attributes([arguments(memory, 64, 30, 50), arguments(memory, 64, 10, 50, m=0), multiply]) == [True, True]


def test_a_thread_begins_with_a_whole_wait(loaded, memory):
    multiply = arguments(memory, 512, 20, 50)
    found: list[list[bool]] = []
    thread = threading.Thread(target=lambda: found.append(attributes([multiply, multiply])))
    thread.start()
    thread.join()
    assert found == [[False, True]]


def test_without_pdl_nothing_has_the_attribute(tmp_path, memory):
    bundle = hdispatch.load(toy.write(tmp_path, with_early(["weight"])), driver="null", pdl=False)
    try:
        assert attributes([arguments(memory, 64, 10, 50), arguments(memory, 512, 20, 10)]) == [False, False]
    finally:
        bundle.unload()


@pytest.mark.parametrize(
    ("early", "words"),
    [
        (["wieght"], r'toy_kernel: reads "wieght" early; toy has no tensor argument of that name: toy\(Tensor'),
        (["epsilon"], 'reads "epsilon" early'),
        (["residual"], "reads residual, which is None in variant bfloat16"),
        ("weight", r"records\[1\].early is 'weight'"),
        ([2], r"records\[1\].early\[0\] is 2"),
    ],
)
def test_wrong_names_are_refused_when_they_are_loaded(tmp_path, early, words):
    with pytest.raises(hdispatch.BundleError, match=words):
        hdispatch.load(toy.write(tmp_path, with_early(early)), driver="null")


def test_inspect_says_what_is_read_early(tmp_path):
    manifest, _ = read_bundle(toy.write(tmp_path, with_early(["weight", "input"])))
    rows = {row["K"]: number for number, row in enumerate(manifest["rows"])}
    assert "early   weight, input: may be read before the wait" in inspect.describe_row(manifest, rows[512])
    assert "early" not in inspect.describe_row(manifest, rows[64])


# ---- the build ----


def of_one_row(*shapes: dict[str, int]) -> Selection:
    return Selection(shapes=lambda _: shapes, buckets=lambda _: (0,), variants=lambda spec: [spec.typical_variant().name])


@pytest.mark.slow
def test_the_products_name_their_weights(tmp_path):
    """And a call with weights that another op of ours has just quantized is launched without the attribute."""
    build(["scaled_mm"], "h200", tmp_path / "bundle", select=of_one_row({"K": 4096, "N": 4096}))
    manifest, _ = read_bundle(tmp_path / "bundle")
    absent = hdispatch.registry.spec("scaled_mm").typical_variant().none
    assert [r["early"] for r in manifest["records"]] == [[n for n in ("b", "b_scales", "bias") if n not in absent]]


@pytest.mark.slow
@pytest.mark.parametrize("given", ['("wieght",)', '"input"', '("x", "M")'])
def test_wrong_names_are_refused_when_they_are_built(tmp_path, monkeypatch, given):
    here = Path(__file__).parents[1] / "support" / "triton_example"
    package = f"early_{abs(hash(given))}"
    shutil.copytree(here, tmp_path / package)
    with (tmp_path / package / "triton.py").open("a") as file:
        file.write(f"\nEARLY_READS = {given}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BuildError, match=r"EARLY_READS is .*; it takes a tuple of tensor arguments of"):
        build(["triton_example"], "h200", tmp_path / "out", extra=[package])


#: A module's end; {} is a line of the kernel.
EARLY = """
@triton.jit
def early_kernel(result, input, other, K: tl.constexpr):
    {}
    at = tl.program_id(0) * K + tl.arange(0, 128)
    y = tl.load(other + at, tl.arange(0, 128) < K)
    tl.extra.cuda.gdc_wait()
    tl.store(result + at, tl.load(input + at, tl.arange(0, 128) < K) + y, tl.arange(0, 128) < K)


def launch(result, input, other, alpha, bias, *, config, _launcher):
    _launcher(early_kernel, (other.size(0),), result, input, other, K=64, num_warps=1, launch_pdl=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("line", "found"), [("tl.extra.cuda.gdc_launch_dependents()", "griddepcontrol.launch_dep"), ("pass", "ld.")]
)
def test_code_that_does_not_wait_first_names_what_it_reads(tmp_path, monkeypatch, line, found, named):
    package = f"early_{found[:2]}_{named}".lower()
    shutil.copytree(Path(__file__).parents[1] / "support" / "triton_example", tmp_path / package)
    with (tmp_path / package / "triton.py").open("a") as file:
        file.write(EARLY.format(line) + ('EARLY_READS = ("other", "bias")\n' if named else ""))
    monkeypatch.syspath_prepend(tmp_path)
    select = Selection(shapes=lambda spec: spec.shapes[:1], buckets=lambda _: (0,))
    if not named:
        with pytest.raises(BuildError, match=f"the code has {found}.* before it waits for its predecessor"):
            build(["triton_example"], "h200", tmp_path / "out", extra=[package], select=select)
        return
    build(["triton_example"], "h200", tmp_path / "out", extra=[package], select=select)
    manifest, _ = read_bundle(tmp_path / "out")
    early = {row["variant"]: manifest["records"][row["record"]]["early"] for row in manifest["rows"]}
    assert sorted(map(tuple, early.values())) == [("other",), ("other", "bias")], early
