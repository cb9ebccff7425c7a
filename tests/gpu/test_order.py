"""Order on the GPU: streams, threads, and programmatic dependent launch before, after and between foreign kernels."""

from __future__ import annotations

import threading

import hdispatch
import pytest
import torch

from .test_ops import OPS, check, copy, make, run_and_check

SHAPES = {op: hdispatch.ops.spec(op).shapes[1] for op in OPS}


def input_index(op):
    return next(i for i, a in enumerate(hdispatch.ops.spec(op).args) if a.name == "input")


@pytest.mark.parametrize("op", OPS)
def test_two_streams(bundle, op):
    """Each stream sees its own data, and the launch goes to the current one."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    args = [make(op, "bfloat16", SHAPES[op], 64, seed=i) for i in range(2)]
    expected = [copy(a) for a in args]
    for e in expected:
        hdispatch.ops.spec(op).reference(*e)
    torch.cuda.synchronize()
    with hdispatch.strict():
        for _ in range(20):
            for stream, a in zip(streams, args, strict=True):
                with torch.cuda.stream(stream):
                    a[0].view(torch.uint8).fill_(0x7F)
                    getattr(hdispatch.ops, op)(*a)
    torch.cuda.synchronize()
    for a, e in zip(args, expected, strict=True):
        check(op, a, e, "two streams")


def test_side_stream_waits_for_its_own_work_only(bundle):
    """A launch on a side stream does not wait for the default stream: it is really on the side stream."""
    op = OPS[0]
    args = make(op, "bfloat16", SHAPES[op], 16)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second on the default stream
    with torch.cuda.stream(side):
        getattr(hdispatch.ops, op)(*args)
        done = torch.cuda.Event()
        done.record()
    done.synchronize()
    assert not torch.cuda.current_stream().query(), "the default stream was idle: the test shows nothing"
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", OPS)
def test_two_threads(bundle, op):
    """Fresh threads, which have no CUDA context of their own yet, through both doors at once."""
    failures = []

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(30):
                    run_and_check(op, make(op, "bfloat16", SHAPES[op], 1 + (seed * 31 + i) % 70, seed=i), f"thread {seed}")
        except BaseException as error:
            failures.append(error)

    hdispatch.strict()
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hdispatch.strict(False)
    assert not failures, failures[0]
    assert hdispatch.stats()[op]["hits"] == 120


def test_first_call_of_a_thread_needs_no_torch_call(bundle):
    """A new thread's very first CUDA call is ours."""
    op = OPS[0]
    args = make(op, "bfloat16", SHAPES[op], 16)
    expected = copy(args)
    hdispatch.ops.spec(op).reference(*expected)
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            getattr(hdispatch.ops, op)(*args)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]
    torch.cuda.synchronize()
    check(op, args, expected, "fresh thread")


@pytest.mark.parametrize("m", [1, 16, 700])
@pytest.mark.parametrize("op", OPS)
def test_pdl_between_foreign_kernels(bundle, op, m):
    """A foreign kernel writes our input just before, another reads and overwrites our output just after, thousands of
    times with other data each time. With the PDL attribute our launch may begin early: it must wait by itself."""
    rounds = 500
    index = input_index(op)
    args = make(op, "bfloat16", SHAPES[op], m)
    sources = torch.stack([make(op, "bfloat16", SHAPES[op], m, seed=s)[index] for s in range(8)])
    expected = []
    for source in sources:
        wanted = copy(args)
        wanted[index] = source.clone()
        hdispatch.ops.spec(op).reference(*wanted)
        expected.append((wanted[0].clone(), wanted[2 if op != OPS[1] else 3].clone()))
    kept = [(torch.empty_like(args[0]), torch.empty_like(expected[0][1])) for _ in range(8)]
    scale = args[2 if op != OPS[1] else 3]
    call = getattr(hdispatch.ops, op)
    with hdispatch.strict():
        for i in range(rounds):
            args[index].fill_(float("nan"))  # poisoned producer
            args[index].copy_(sources[i % 8])
            call(*args)
            kept[i % 8][0].copy_(args[0])
            kept[i % 8][1].copy_(scale)
            args[0].view(torch.uint8).fill_(0x7F)
            scale.fill_(float("nan"))
            if i % 8 == 7:
                for (codes, scales), (want_codes, want_scales) in zip(kept, expected, strict=True):
                    same = (codes.view(torch.uint8) == want_codes.view(torch.uint8)).float().mean().item()
                    assert same >= 0.999, f"round {i}: {same:.5f} of the codes are right"
                    torch.testing.assert_close(scales, want_scales, rtol=1e-6, atol=0)


def test_pdl_chain_of_own_launches(bundle):
    """Launch after launch into the same residual: each must see all that the one before wrote, hundreds deep."""
    op = "rms_norm_dynamic_per_token_quant"
    for m in (1, 16, 1024):
        args = make(op, "bfloat16+residual", {"K": 4096}, m)
        args[1] = torch.randn_like(args[1]) * 0.01
        expected = args[6].clone()
        with hdispatch.strict():
            for _ in range(300):
                getattr(hdispatch.ops, op)(*args)
        for _ in range(300):
            expected = (expected.float() + args[1].float()).to(expected.dtype)
        torch.cuda.synchronize()
        assert torch.equal(args[6], expected), f"M={m}: {(args[6] != expected).sum().item()} elements differ"


def test_several_devices(bundle_dir):
    """Tables per device; the current device need not be the tensors'."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, there is {torch.cuda.device_count()}")
    op = OPS[0]
    loaded = [hdispatch.load(bundle_dir, device=i) for i in range(2)]
    try:
        with hdispatch.strict():
            for current in range(2):
                with torch.cuda.device(current):
                    for device in range(2):
                        args = [
                            a.to(f"cuda:{device}") if isinstance(a, torch.Tensor) else a
                            for a in make(op, "bfloat16", SHAPES[op], 16)
                        ]
                        expected = copy(args)
                        hdispatch.ops.spec(op).reference(*expected)
                        getattr(hdispatch.ops, op)(*args)
                        torch.cuda.synchronize(device)
                        check(op, args, expected, f"current {current}, tensors on {device}")
                        assert torch.cuda.current_device() == current
    finally:
        for bundle in loaded:
            bundle.unload()
