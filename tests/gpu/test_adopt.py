"""Adopted kernels on a GPU: right results over random calls, streams, graphs, threads, and Triton's own errors."""

from __future__ import annotations

import random
import threading
from typing import Any

import hdispatch
import pytest
import torch

triton = pytest.importorskip("triton")

import adopted_kernels as kernels  # noqa: E402
import triton.language as tl  # noqa: E402


@pytest.fixture(autouse=True)
def left_alone():
    hdispatch.stats(reset=True)
    yield
    hdispatch.unadopt()


def counts(kernel: Any) -> dict[str, Any]:
    function = kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    return hdispatch.stats()[f"adopted {function.fn.__module__}.{function.fn.__qualname__}"]


def fresh(function: Any) -> Any:
    return hdispatch.adopt(triton.jit(function.fn))


@triton.jit
def axpy(x, y, o, n, sx, sy, alpha, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = i < n
    a = tl.load(x + i * sx, keep, 0.0).to(tl.float32)
    if y is not None:
        a = a * alpha + tl.load(y + i * sy, keep, 0.0).to(tl.float32)
    if FLIP:
        a = -a
    tl.store(o + i, a.to(o.dtype.element_ty), keep)


def test_random_calls_are_right():
    """Alignment, strides, sizes around 1 and multiples of 16, dtypes, None, scalars: against torch, outputs poisoned."""
    rng = random.Random(0)
    kernel = fresh(axpy)
    memory = {dtype: torch.randn(1 << 15, device="cuda").to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    for turn in range(6000):
        dtype = rng.choice(list(memory))
        n = rng.choice((1, 2, 15, 16, 17, 31, 32, 33, 1000, 1024))
        sx, sy = rng.choice((1, 2, 3)), 1
        x, y = (memory[dtype][start:][::step][:n] for start, step in ((rng.choice((0, 0, 1, 8)), sx), (rng.choice((0, 8)), sy)))
        y = rng.choice((y, None))
        alpha, flip = rng.choice((0.5, 1.0, -3.25, 1e-3)), rng.random() < 0.5
        out = torch.full((n + 16,), float("nan"), device="cuda", dtype=dtype)[rng.choice((0, 1)) :][:n]
        kernel[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, y, out, n, sx, sy, alpha, FLIP=flip, BLOCK=64)
        wanted = x.float() if y is None else x.float() * alpha + y.float()
        wanted = -wanted if flip else wanted
        torch.testing.assert_close(
            out.float(), wanted.to(dtype).float(), rtol=1e-2, atol=1e-2, msg=lambda m, t=turn: f"{t}: {m}"
        )
    assert counts(kernel)["hits"] > 5000


@triton.jit
def echo(o, p, a, b, flag, f, t, y, MODE: tl.constexpr, BLOCK: tl.constexpr = 32):
    """What the code sees of each argument: integers go to `o`, floats and what tensors hold to `p`."""
    i = tl.arange(0, BLOCK)
    first = tl.program_id(0) * 3 + tl.program_id(1)
    tl.store(o + 4 * first, a)
    tl.store(o + 4 * first + 1, b)
    tl.store(o + 4 * first + 2, flag)
    tl.store(o + 4 * first + 3, MODE if MODE is not None else 77)
    tl.store(p + 64, f)
    tl.store(p + i, tl.load(t + i).to(tl.float32))
    if y is not None:
        tl.store(p + 65 + i, tl.load(y + i).to(tl.float32))


ECHOES = {
    "plain": {},
    "do_not_specialize": {"do_not_specialize": ["a", 3]},
    "do_not_specialize_on_alignment": {"do_not_specialize_on_alignment": ["t", "b"]},
    "debug": {"debug": True},
}
INTEGERS = (0, 1, 2, 15, 16, 17, 1024, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**40, 2**63 - 1, -16, -1)
FLOATS = (0.0, 1.0, -0.0, 2.5, 1e-30, 1e300, float("inf"), float("nan"))
DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
)  # fmt: skip


@pytest.mark.parametrize("form", ECHOES)
def test_random_calls_write_what_tritons_own_write(form):
    """Scalars at the edges of 32 and 64 bits, dtypes, alignments, strides, None, constants, options, grids: bit for bit."""
    rng = random.Random(form)
    ours = hdispatch.adopt(triton.jit(echo.fn, **ECHOES[form]))
    theirs = triton.jit(echo.fn, **ECHOES[form])
    memory = {dtype: (100 * torch.randn(4096, device="cuda")).to(dtype) for dtype in DTYPES}
    made = [(torch.empty(64, dtype=torch.int64, device="cuda"), torch.empty(128, device="cuda")) for _ in range(2)]
    kinds = [  # of each some values: the number of keys is the number of compilations
        (
            rng.choice(DTYPES),
            rng.choice((0, 0, 1, 3)),
            rng.choice((None, *DTYPES)),
            rng.choice((None, 3, True)),
            rng.choice((1, 4)),
        )
        for _ in range(8)
    ]
    for turn in range(3000):
        dtype, offset, other, mode, warps = rng.choice(kinds)
        a, b, flag, f = rng.choice(INTEGERS), rng.choice((1, 2, 16, 48, 7)), rng.random() < 0.5, rng.choice(FLOATS)
        t = memory[dtype][offset + 16 * rng.randrange(9) :][:: rng.choice((1, 1, 2))]
        y = None if other is None else memory[other][16 * rng.randrange(9) :]
        grid = (rng.randrange(1, 5), rng.randrange(1, 4))
        blocks = (lambda _meta, grid=grid: grid) if turn % 3 else grid
        for kernel, (o, p) in zip((ours, theirs), made, strict=True):
            o.fill_(-99)
            p.fill_(float("nan"))
            kernel[blocks](o, p, a, b, flag, f, t, y, MODE=mode, num_warps=warps)
        said = (turn, a, b, flag, f, dtype, offset, other, mode, grid)
        assert torch.equal(made[0][0], made[1][0]), said
        assert torch.equal(made[0][1].view(torch.int32), made[1][1].view(torch.int32)), said
    counted = hdispatch.stats()[f"adopted {echo.fn.__module__}.{echo.fn.__qualname__}"]
    assert counted["hits"] > 2000, counted


def test_launches_go_to_the_current_stream():
    add = fresh(kernels.add)
    x = torch.ones(1024, device="cuda")
    out, side = torch.zeros_like(x), torch.cuda.Stream()
    for _ in range(2):
        add[(4,)](x, x, out, 1024, BLOCK=256)
    torch.cuda.synchronize()
    out.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    with torch.cuda.stream(side):
        add[(4,)](x, x, out, 1024, BLOCK=256)
    side.synchronize()
    assert torch.equal(out, 2 * x)
    assert counts(add)["hits"] == 2


def test_capture_and_replay():
    add = fresh(kernels.add)
    x, out = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
    for _ in range(2):
        add[(4,)](x, x, out, 1024, BLOCK=256)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        add[(4,)](x, out, out, 1024, BLOCK=256)
        add[(4,)](x, out, out, 1024, BLOCK=256)
    out.zero_()
    for turn in range(1, 4):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, 2 * turn * x)
    assert counts(add)["hits"] == 3


def test_threads_that_have_no_context_yet():
    add = fresh(kernels.add)
    x = torch.ones(4096, device="cuda")
    outs = [torch.zeros_like(x) for _ in range(4)]
    for _ in range(2):
        add[(16,)](x, x, outs[0], 4096, BLOCK=256)

    def work(out: torch.Tensor) -> None:
        for _ in range(200):
            add[(16,)](x, x, out, 4096, BLOCK=256)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert all(torch.equal(out, 2 * x) for out in outs)
    assert counts(add)["hits"] == 801


def test_a_full_queue_holds_no_other_thread():
    add = fresh(kernels.add)
    x = torch.ones(1024, device="cuda")
    for _ in range(2):
        add[(4,)](x, x, x, 1024, BLOCK=256)
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.01):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    for _ in range(5000):
        add[(4,)](x, x, x, 1024, BLOCK=256)
    stop.set()
    thread.join()
    torch.cuda.synchronize()
    assert ticks > 20


def test_a_tensor_of_the_cpu_is_refused_as_triton_does():
    add = fresh(kernels.add)
    x = torch.ones(1024, device="cuda")
    for _ in range(2):
        add[(4,)](x, x, x, 1024, BLOCK=256)
    with pytest.raises(ValueError, match="cpu tensor"):
        add[(4,)](x.cpu(), x, x, 1024, BLOCK=256)
    assert counts(add)["misses"]["tensor on another device"] == 1


def test_clusters_shared_memory_and_pdl_are_as_triton_launches_them():
    for options in ({"num_ctas": 2}, {"launch_pdl": True}, {"num_warps": 8}, {"launch_cooperative_grid": True}):
        hdispatch.stats(reset=True)
        add = fresh(kernels.add)
        x, out = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
        for _ in range(3):
            out.zero_()
            add[(4,)](x, x, out, 1024, BLOCK=256, **options)
            torch.cuda.synchronize()
            assert torch.equal(out, 2 * x), options
        assert counts(add)["hits"] == 2


def test_an_autotuned_kernel():
    @hdispatch.adopt
    @triton.autotune([triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in ((64, 2), (256, 4))], key=["n"])
    @triton.jit
    def tuned(x, o, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(o + i, tl.load(x + i, i < n) + 1, i < n)

    for n in (1000, 4096, 1000, 17, 4096, 17):
        x, out = torch.randn(n, device="cuda"), torch.empty(n, device="cuda")
        tuned[lambda meta, n=n: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n)
        assert torch.equal(out, x + 1)
    assert counts(tuned)["hits"] == 3


def test_all_of_the_process():
    with hdispatch.adopting():
        kernel = triton.jit(kernels.add.fn)
        x, out = torch.ones(1024, device="cuda"), torch.zeros(1024, device="cuda")
        for _ in range(3):
            kernel[(4,)](x, x, out, 1024, BLOCK=256)
        torch.cuda.synchronize()
    assert torch.equal(out, 2 * x)
    assert counts(kernel)["hits"] == 2


def test_a_helion_kernel_at_ms_never_seen():
    pytest.importorskip("helion")
    import adopted_helion

    for name, inputs, reference in (
        ("add", 2, lambda x, y: x + y),
        ("flattened", 1, lambda x: x + 1),
        ("static", 1, lambda x: x * 2),
        ("zeros", 1, lambda x: x),
    ):
        kernel = hdispatch.adopt(getattr(adopted_helion, name))
        for m in (7, 7, 16, 16, 33, *random.Random(0).sample(range(2, 3000), 20 if name != "static" else 2), 1, 1, 1):
            args = [torch.randn(m, 64, device="cuda") for _ in range(inputs)]
            torch.testing.assert_close(kernel(*args), reference(*args))
    x = torch.randn(99, 64, device="cuda")
    specialized = hdispatch.adopt(adopted_helion.specialized)
    for _ in range(3):
        out, total = specialized(x, 2.5)
    torch.testing.assert_close(out, x * 2.5)
    torch.testing.assert_close(total, (x * 2.5).sum(-1))
    for name in ("add", "flattened", "zeros"):
        counted, said = hdispatch.stats()[f"adopted adopted_helion.{name}"], hdispatch.explain(getattr(adopted_helion, name))
        assert counted["hits"] >= 20, (name, counted, said)
        assert "any M" in said, (name, said)


def test_a_helion_kernel_with_heuristics_at_ms_never_seen():
    pytest.importorskip("helion")
    import adopted_aot

    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("its heuristics are for sm90")
    kernel = hdispatch.adopt(adopted_aot.tuned)
    for m in (7, 7, 16, 16, 33, 112, 113, 113, 128, 128, *random.Random(0).sample(range(2, 3000), 30)):
        x = torch.randn(m, 64, device="cuda")
        torch.testing.assert_close(kernel(x), x * 2)
    counted = hdispatch.stats()["adopted adopted_aot.tuned"]
    assert counted["hits"] >= 30, (counted, hdispatch.explain(kernel))
