"""Order on the GPU: streams, threads, and programmatic dependent launch before, after and between foreign kernels."""

from __future__ import annotations

import threading

import hdispatch
import pytest
import torch

from .test_ops import OPS, check, copy, most_rows, run_and_check, typical_case, written
from .test_ops import make as make_at

#: Of the arguments of a call that is made with many sets of them.
MOST_ELEMENTS = 2**28


def make(op, m, seed=0):
    """Arguments of the op's typical variant at its first shape."""
    return make_at(op, *typical_case(op), m, seed=seed)


def compare(op, args, expected, where):
    check(op, typical_case(op)[0], args, expected, where)


def restored(args, saved):
    """Puts the values back where they were, on the current stream."""
    for arg, value in zip(args, saved, strict=True):
        if isinstance(arg, torch.Tensor):
            arg.copy_(value)


@pytest.mark.parametrize("op", OPS)
def test_two_streams(bundle, op):
    """Each stream sees its own data, and the launch goes to the current one."""
    streams = [torch.cuda.Stream() for _ in range(2)]
    m = min(64, most_rows(op, typical_case(op)[1]))
    args = [make(op, m, seed=i) for i in range(2)]
    saved = [copy(a) for a in args]
    expected = [copy(a) for a in args]
    for e in expected:
        hdispatch.registry.spec(op).reference(*e)
    torch.cuda.synchronize()
    with hdispatch.strict():
        for _ in range(20):
            for stream, a, s in zip(streams, args, saved, strict=True):
                with torch.cuda.stream(stream):
                    restored(a, s)
                    getattr(hdispatch.ops, op)(*a)
    torch.cuda.synchronize()
    for a, e in zip(args, expected, strict=True):
        compare(op, a, e, "two streams")


def test_side_stream_waits_for_its_own_work_only(bundle):
    """A launch on a side stream does not wait for the default stream: it is really on the side stream."""
    op = OPS[0]
    args = make(op, 16)
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
    variant, sizes = typical_case(op)

    def work(seed):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(30):
                    args = make(op, 1 + (seed * 31 + i) % min(60, most_rows(op, sizes)), seed=i)
                    run_and_check(op, variant, args, f"thread {seed}, {sizes}")
        except BaseException as error:
            failures.append(error)

    hdispatch.set_strict()
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hdispatch.set_strict(False)
    if failures:
        raise failures[0]
    assert hdispatch.stats()[op]["hits"] == 120


def test_first_call_of_a_thread_needs_no_torch_call(bundle):
    """A new thread's very first CUDA call is ours."""
    op = OPS[0]
    args = make(op, 16)
    expected = copy(args)
    hdispatch.registry.spec(op).reference(*expected)
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
    if failures:
        raise failures[0]
    torch.cuda.synchronize()
    compare(op, args, expected, "fresh thread")


@pytest.mark.parametrize("m", [1, 16, 700])
@pytest.mark.parametrize("op", OPS)
def test_pdl_between_foreign_kernels(bundle, op, m):
    """Foreign kernels write our inputs just before, others read and overwrite our outputs just after, hundreds of times
    with other data each time. With the PDL attribute our launch may begin early: it must wait by itself."""
    variant, sizes = typical_case(op)
    one_row = sum(arg.numel() for arg in make(op, 1) if isinstance(arg, torch.Tensor))
    m = min(m, most_rows(op, sizes), max(1, MOST_ELEMENTS // one_row))
    rounds, count = 400, 8
    args = make(op, m)
    sources = [make(op, m, seed=s) for s in range(count)]
    expected = [copy(source) for source in sources]
    for e in expected:
        hdispatch.registry.spec(op).reference(*e)
    kept = [{i: torch.empty_like(args[i]) for i in written(op) if args[i] is not None} for _ in range(count)]
    call = getattr(hdispatch.ops, op)
    with hdispatch.strict():
        for i in range(rounds):
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.dtype.is_floating_point:
                    bits_of(arg).fill_(0x7F)  # poisoned producer: NaN or nearly the largest number
            restored(args, sources[i % count])
            call(*args)
            for index, into in kept[i % count].items():
                into.copy_(args[index])
                bits_of(args[index]).fill_(0x7F)
            if i % count == count - 1:
                for got, want in zip(kept, expected, strict=True):
                    whole = list(want)
                    for index, value in got.items():
                        whole[index] = value
                    check(op, variant, whole, want, f"round {i}, {sizes}")


def bits_of(tensor):
    """The bytes of a dense tensor, whatever the order of its dimensions."""
    order = sorted(range(tensor.dim()), key=lambda d: -tensor.stride(d))
    return tensor.permute(order).view(torch.uint8)


def test_pdl_chain_of_own_launches(bundle):
    """Launch after launch into the same residual: each must see all that the one before wrote, hundreds deep."""
    op = "rms_norm_dynamic_per_token_quant"
    for m in (1, 16, 1024):
        args = make_at(op, "bfloat16+residual", {"K": 4096}, m)
        args[1] = torch.randn_like(args[1]) * 0.01
        expected = args[6].clone()
        with hdispatch.strict():
            for _ in range(300):
                getattr(hdispatch.ops, op)(*args)
        for _ in range(300):
            expected = (expected.float() + args[1].float()).to(expected.dtype)
        torch.cuda.synchronize()
        assert torch.equal(args[6], expected), f"M={m}: {(args[6] != expected).sum().item()} elements differ"


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("between", [0, 2])
def test_weights_that_were_quantized_just_before(bundle, between, captured):
    """The product at M=1 reads its weights before it waits, and releases its dependents before that: not while our own
    quantization still writes them, nor behind other products, hundreds of times with other weights each time."""
    op, size, rounds, count = "scaled_mm", 4096, 400, 4
    quantize, multiply = hdispatch.ops.dynamic_per_token_scaled_fp8_quant, hdispatch.ops.scaled_mm
    sources = [make_at(quantize.name, "bfloat16", {"K": size}, size, seed=s)[1] for s in range(count)]
    codes, source, scales, _ = make_at(quantize.name, "bfloat16", {"K": size}, size)
    variant, sizes = typical_case(op)[0], {"K": size, "N": size}
    products = [make_at(op, variant, sizes, 1, seed=s) for s in range(1 + between)]
    last = products[-1]
    last[2], last[4] = codes.t(), scales

    def run():
        quantize(codes, source, scales, None)
        for product in products:
            multiply(*product)

    expected = []
    for given in sources:
        source.copy_(given)
        quantize(codes, source, scales, None)
        torch.cuda.synchronize()
        run_and_check(op, variant, last, "weights that are there")
        expected.append(last[0].clone())
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph), hdispatch.strict():
            run()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    with hdispatch.strict():
        for i in range(rounds):
            source.copy_(sources[i % count])
            for tensor in (codes, scales, last[0]):
                bits_of(tensor).fill_(0x7F)  # NaN, or nearly the largest number
            if captured:
                graph.replay()
            else:
                run()
            wrong += (last[0] != expected[i % count]).sum()
    assert wrong.item() == 0, f"{wrong.item()} wrong outputs in {rounds} rounds of {size}"


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
                        args = [a.to(f"cuda:{device}") if isinstance(a, torch.Tensor) else a for a in make(op, 16)]
                        expected = copy(args)
                        hdispatch.registry.spec(op).reference(*expected)
                        getattr(hdispatch.ops, op)(*args)
                        torch.cuda.synchronize(device)
                        compare(op, args, expected, f"current {current}, tensors on {device}")
                        assert torch.cuda.current_device() == current
    finally:
        for bundle in loaded:
            bundle.unload()
