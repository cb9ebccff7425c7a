"""The drop-in over vLLM's own library, $HDISPATCH_VLLM_OPS: the same results through torch.ops._C with and without it.

And torch.ops._C_cache_ops, which that library has too; and torch.ops._moe_C where its library lies beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.integrations.vllm import ROUTES

from .test_ops import bits, check, copy, make, most_rows, sizes_of, spec_of, written

LIBRARY = os.environ.get("HDISPATCH_VLLM_OPS")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="HDISPATCH_VLLM_OPS names no library of vLLM's ops")

LIBRARIES = [LIBRARY, *map(str, sorted(Path(LIBRARY).parent.glob("_moe_C*.so")))] if LIBRARY else []
#: Those whose library there is.
NAMES = [name for name, routes in ROUTES.items() if routes[0].namespace != "_moe_C" or len(LIBRARIES) > 1]
CASES = [pytest.param(name, route.op, id=f"{name}-{route.op}") for name in NAMES for route in ROUTES[name]]


@pytest.fixture(autouse=True)
def library():
    for each in LIBRARIES:
        torch.ops.load_library(each)


@pytest.fixture
def override():
    with hdispatch.override_vllm_ops() as made:
        assert sorted(made.served) == sorted(NAMES), made
        yield made


def packet(name):
    return getattr(getattr(torch.ops, ROUTES[name][0].namespace), name)


def theirs(name, args):
    """The arguments that vLLM's op has."""
    count = len(packet(name).default._schema.arguments)
    return [*args[:count], *([None] * (count - len(args)))]


def variants(op):
    """Those that vLLM's op has too: ours may have a flag more."""
    own = "scale_ue8m0" if op.endswith("per_block_quant") else ""
    return [v for v in spec_of(op).served_variants() if not v.static.get(own)]


def results(name, op, variant, shape, m, seed=0):
    """(arguments before, after vLLM's kernel, after ours through the packet, after ours through the dispatcher)"""
    inputs = make(op, variant.name, shape, m, seed=seed)
    lists = [copy(inputs) for _ in range(3)]
    packet(name).default(*theirs(name, lists[0]))
    with hdispatch.override_vllm_ops(), hdispatch.strict():
        with torch.inference_mode():
            packet(name)(*theirs(name, lists[1]))
        packet(name).default(*theirs(name, lists[2]))
    torch.cuda.synchronize()
    return inputs, *lists


def compare(op, variant, got, wanted, where, inputs):
    """Our results equal vLLM's, or a GEMM's the reference's. test_vllm.py counts fp8 codes and compares with CUTLASS."""
    if op.startswith("scaled_mm") or op == "moe_align_block_size":  # vLLM has an expert's rows in any order
        wanted = copy(inputs)
        spec_of(op).reference(*wanted)
    check(op, variant.name, got, wanted, where, inputs, min_equal=0.99)


def tokens(op, sizes):
    """A few M at which vLLM and we have a kernel."""
    some = (4, 16, 64) if op == "scaled_mm_blockwise" else (1, 16, 17, 64)  # blockwise, vLLM takes M % 4 == 0
    return [m for m in some if m <= most_rows(op, sizes)]


@pytest.mark.parametrize(("name", "op"), CASES)
def test_same_results(bundle, name, op):
    """Every variant and shape at a few M, through the packet and through torch's dispatcher."""
    calls = 0
    for variant in variants(op):
        for shape in spec_of(op).shapes:
            sizes = sizes_of(spec_of(op), shape)
            for m in tokens(op, sizes):
                inputs, wanted, got, dispatched = results(name, op, variant, sizes, m, seed=m)
                compare(op, variant, got, wanted, f"{variant.name} {sizes} M={m}", inputs)
                calls += 2
                for i in written(op):
                    assert got[i] is None or torch.equal(bits(got[i]), bits(dispatched[i]))
    assert hdispatch.stats()[op] == {"hits": calls, "empty": 0, "fallbacks": 0, "misses": {}}


def columns(tensor, pitch):
    """An empty matrix of the same shape with contiguous columns, `pitch` elements apart."""
    return torch.empty_strided(tensor.shape, (1, pitch), dtype=tensor.dtype, device="cuda").fill_(float("nan"))


@pytest.mark.parametrize("m", [1, 6, 16])
@pytest.mark.parametrize(
    ("name", "scale", "flag"),
    [
        ("per_token_group_fp8_quant", 2, None),
        ("rms_norm_per_block_quant", 3, 8),
        ("silu_and_mul_per_block_quant", 2, 5),
    ],
)
def test_scales_in_columns(bundle, override, name, scale, flag, m):
    """Where vLLM's kernel writes scales by a flag and ours by the strides, both do the same or the call is vLLM's."""
    variant = variants(name)[0]
    sizes = sizes_of(spec_of(name), spec_of(name).shapes[0])
    override.undo()
    for transposed in (False, True) if flag else (True,):
        for pitch in (None, m, (m + 3) // 4 * 4):
            inputs = make(name, variant.name, sizes, m)
            if pitch:
                inputs[scale] = columns(inputs[scale], pitch)
            if flag:
                inputs[flag] = transposed
            got, wanted, hits = copy(inputs), copy(inputs), hdispatch.stats()[name]["hits"]
            try:
                packet(name).default(*theirs(name, wanted))
            except RuntimeError:
                continue  # vLLM refuses columns without the flag
            with hdispatch.override_vllm_ops():
                packet(name)(*theirs(name, got))
            torch.cuda.synchronize()
            if hdispatch.stats()[name]["hits"] > hits:
                compare(name, variant, got, wanted, f"M={m} pitch {pitch} transposed {transposed}", inputs)
            else:  # its scales are not where the strides say
                assert all(torch.equal(bits(got[i]), bits(wanted[i])) for i in written(name) if got[i] is not None)
    found = hdispatch.stats()[name]
    assert found["hits"] >= (3 if flag is None else 2), found
    assert all(reason.endswith(": strides that the overridden op does not read") for reason in found["misses"]), found


@pytest.mark.parametrize(("name", "op"), CASES)
def test_capture_and_replay(bundle, override, name, op):
    variant = variants(op)[0]
    sizes = sizes_of(spec_of(op), spec_of(op).shapes[0])
    args = make(op, variant.name, sizes, 16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), hdispatch.strict():
        packet(name)(*theirs(name, args))
    override.undo()  # the graph keeps what it captured
    for seed in range(1, 4):
        fresh = make(op, variant.name, sizes, 16, seed=seed)
        for held, new in zip(args, fresh, strict=True):
            if isinstance(held, torch.Tensor):
                held.copy_(new)
        inputs, wanted = copy(args), copy(args)
        graph.replay()
        packet(name).default(*theirs(name, wanted))
        torch.cuda.synchronize()
        compare(op, variant, args, wanted, f"replay {seed}", inputs)


@pytest.mark.parametrize(("name", "op"), CASES)
def test_compiled_code(bundle, name, op):
    variant = variants(op)[0]
    sizes = sizes_of(spec_of(op), spec_of(op).shapes[0])
    at = written(op)[0]

    def program(*args):
        packet(name)(*args)
        return args[at].float() + 1

    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=False)
    inputs = make(op, variant.name, sizes, 16)
    got, wanted = copy(inputs), copy(inputs)
    with torch.no_grad(), hdispatch.override_vllm_ops(), hdispatch.strict():
        out = compiled(*theirs(name, got))
    assert hdispatch.stats()[op]["hits"] == 1
    packet(name).default(*theirs(name, wanted))
    torch.cuda.synchronize()
    compare(op, variant, got, wanted, "compiled", inputs)
    assert torch.equal(out, got[at].float() + 1)


def test_misses_run_vllms_kernel(bundle, override):
    """float32 is a dtype that vLLM's ops take and ours do not; the results are vLLM's to the bit."""
    x = torch.randn(16, 4096, device="cuda")
    weight = torch.randn(4096, device="cuda")
    out = [torch.empty(16, 4096, device="cuda") for _ in range(3)]
    torch.ops._C.rms_norm(out[0], x, weight, 1e-6)
    torch.ops._C.rms_norm.default(out[1], x, weight, 1e-6)
    assert hdispatch.stats()["rms_norm"]["misses"] == {"override: result: dtype": 2}
    override.undo()
    torch.ops._C.rms_norm(out[2], x, weight, 1e-6)
    assert torch.equal(out[0], out[2])
    assert torch.equal(out[1], out[2])


def test_without_a_bundle_nothing_changes(override):
    x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
    out = [torch.empty(16, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    hdispatch.stats(reset=True)
    torch.ops._C.silu_and_mul(out[0], x)
    assert hdispatch.stats()["silu_and_mul"]["misses"] == {"no table": 1}
    override.undo()
    torch.ops._C.silu_and_mul(out[1], x)
    assert torch.equal(out[0], out[1])


def test_vllms_errors_are_vllms(bundle, override):
    x = torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16)
    for call in (torch.ops._C.static_scaled_fp8_quant, torch.ops._C.static_scaled_fp8_quant.default):
        with pytest.raises(RuntimeError, match="1D scale requires explicit group_shape"):
            call(torch.empty_like(x, dtype=torch.float8_e4m3fn), x, torch.ones(16, device="cuda"))


def test_undo(bundle):
    """An op is vLLM's again after the last undo; what others hold stays the same object."""
    held = packet("silu_and_mul")
    x = torch.randn(16, 12288, device="cuda", dtype=torch.bfloat16)
    out = [torch.empty(16, 6144, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    with hdispatch.override_vllm_ops():
        inner = hdispatch.override_vllm_ops(["silu_and_mul"])
        held(out[0], x)
        inner.undo()
        held.default(out[1], x)
    assert hdispatch.stats()["silu_and_mul"]["hits"] == 2
    held(out[2], x)
    held.default(out[3], x)
    torch.ops._C.silu_and_mul(out[4], x)
    found = hdispatch.stats()["silu_and_mul"]
    assert (found["hits"], found["fallbacks"]) == (2, 0)
    assert type(held) is torch._ops.OpOverloadPacket
    assert torch.equal(out[2], out[3])
    assert torch.equal(out[2], out[4])
    torch.testing.assert_close(out[0], out[2])
    assert torch.equal(out[0], out[1])


def test_threads_while_overrides_come_and_go(bundle):
    """Each thread on a stream of its own, through both doors."""
    x = torch.randn(16, 12288, device="cuda", dtype=torch.bfloat16)
    wanted = torch.empty(16, 6144, device="cuda", dtype=torch.bfloat16)
    packet("silu_and_mul")(wanted, x)
    torch.cuda.synchronize()
    stop, results = threading.Event(), []

    def work(call):
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                out = torch.zeros_like(wanted)
                for _ in range(10):
                    call(out, x)
                torch.cuda.current_stream().synchronize()
            results.append(out)

    calls = [packet("silu_and_mul"), packet("silu_and_mul").default] * 2
    hdispatch.override_vllm_ops(["silu_and_mul"]).undo()  # the first is not for threads
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for _ in range(100):
        with hdispatch.override_vllm_ops(["silu_and_mul"]):
            time.sleep(0.002)
    stop.set()
    for thread in threads:
        thread.join()
    assert len(results) == len(threads)
    for out in results:
        torch.testing.assert_close(out, wanted)
    assert hdispatch.stats()["silu_and_mul"]["hits"] > 0
    assert hdispatch.stats()["silu_and_mul"]["fallbacks"] == 0


LATER = """
import sys, torch, hdispatch
override = hdispatch.override_vllm_ops()
assert len(override.waiting) == {count} and not override.served, override
torch.ops.load_library({library!r})
hdispatch.load({bundle!r})
x = torch.randn(16, 12288, device="cuda", dtype=torch.bfloat16)
out = torch.empty(16, 6144, device="cuda", dtype=torch.bfloat16)
with hdispatch.strict():
    torch.ops._C.silu_and_mul(out, x)
torch.cuda.synchronize()
assert override.served == ["silu_and_mul"], override
print(hdispatch.stats()["silu_and_mul"]["hits"])
"""


def test_library_that_is_loaded_later(bundle_dir):
    """In a process of its own, which ends with the override on."""
    code = LATER.format(count=len(ROUTES), library=LIBRARY, bundle=str(bundle_dir))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
