"""Races between cubin rows and CuteDSL rows under PDL: chains of both, poisoned, behind foreign kernels and copies, captured.

What a chain computes while its launches follow one another as fast as they can is compared bit by bit with what it computes
with the device synchronized after every launch, and that with the float32 references. HDISPATCH_RACE_REPEATS is how often
each chain runs.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import hdispatch
import pytest
import torch
from hdispatch.manifest import MANIFEST_NAME

from benchmarks.pdl.chains import CHAINS, make_chain

from .test_load import rewrite
from .test_ops import check, copy, make, run_and_check

REPEATS = int(os.environ.get("HDISPATCH_RACE_REPEATS", "2000"))
#: GPU cycles of a kernel before each run, some 80 and 250 µs: so the whole of it is in the stream before it begins, and each
#: launch may follow the one before it as early as PDL lets it.
SPIN, LONG_SPIN = 150_000, 500_000
#: GPU cycles for which a foreign kernel holds up what it hands on.
DELAY = 2_000
#: Bytes that poison is made of: NaN in every type, the largest number or so; in each third run the results of another run stay.
POISONS = (0xFF, 0x7F, None)
SOURCES = 4


def require_both_kinds(bundle_dir):
    """Skip unless the bundle has cubin rows and CuteDSL rows."""
    records = json.loads((Path(bundle_dir) / MANIFEST_NAME).read_text())["records"]
    if {record["launcher"] for record in records} < {"cubin", "tvm_ffi"}:
        pytest.skip("the bundle has no CuteDSL rows: it was built where nvidia-cutlass-dsl is not installed")


@pytest.fixture(scope="module")
def mixed(bundle_dir):
    """A bundle with rows of both kinds, on the current device; every call is to be served by it."""
    require_both_kinds(bundle_dir)
    hdispatch.load(bundle_dir)
    with hdispatch.strict():
        yield bundle_dir
    for loaded in hdispatch.loaded():
        loaded.unload()


class Arena:
    """Memory for all that a chain writes: poisoned and compared as a whole."""

    def __init__(self, size=2**21):
        self.bytes = torch.zeros(size, dtype=torch.uint8, device="cuda")
        self.used = torch.zeros(size, dtype=torch.bool, device="cuda")
        self.end = 0

    def empty(self, shape, dtype):
        """Memory for a tensor."""
        start, size = self.end, torch.Size(shape).numel() * dtype.itemsize
        self.end = (start + size + 255) // 256 * 256
        assert self.end <= len(self.bytes), "the arena is too small"
        self.used[start : start + size] = True
        return self.bytes[start : start + size].view(dtype).view(shape)

    def trim(self):
        """Forget what is not used, once all is made."""
        self.bytes, self.used = self.bytes[: self.end], self.used[: self.end]

    def poison(self, run):
        """As POISONS has it for the run of that number."""
        value = POISONS[run % len(POISONS)]
        if value is not None:
            self.bytes.fill_(value)

    def wrong(self, expected):
        """How many bytes are not as expected, on the device."""
        return ((self.bytes != expected) & self.used).sum()


def chain_in_arena(name, m):
    arena = Arena()
    chain = make_chain(name, m, torch.device("cuda"), arena.empty)
    arena.trim()
    return chain, arena


def one_at_a_time(chain, arena, start):
    """The arena after calls that each had the device to themselves, every one compared with its reference."""
    arena.poison(0)
    chain.restart(start)
    for number, step in enumerate(chain.steps):
        inputs, expected = copy(step.arguments), copy(step.arguments)
        hdispatch.registry.spec(step.op).reference(*expected)
        torch.cuda.synchronize()
        step.call()()
        torch.cuda.synchronize()
        # Few rows have few codes, of which one may be off.
        check(step.op, step.variant, step.arguments, expected, f"step {number} of {chain.name}", inputs, min_equal=0.99)
    return arena.bytes.clone()


def plain(chain):
    """The chain's calls, nothing between them."""
    calls = chain.calls()

    def run():
        for call in calls:
            call()

    return run


def by_kernel(into, source):
    """A copy that is a kernel of torch."""
    torch.bitwise_or(source, 0, out=into)


def by_memcpy(into, source):
    """A copy that is cudaMemcpyAsync."""
    into.copy_(source)


def through_foreign(chain, move):
    """Foreign work after every call: what it wrote is read, poisoned, and put back late, for the next call to read."""
    work = []
    for step in chain.steps:
        results = [tensor.view(torch.uint8) for tensor in step.written()]
        work.append((step.call(), [(result, torch.empty_like(result)) for result in results]))

    def run():
        for call, results in work:
            call()
            for result, kept in results:
                move(kept, result)
                result.fill_(0xFF)
            torch.cuda._sleep(DELAY)
            for result, kept in results:
                move(result, kept)

    return run


BETWEEN = {
    "nothing": plain,
    "kernels": functools.partial(through_foreign, move=by_kernel),
    "copies": functools.partial(through_foreign, move=by_memcpy),
}


def captured(run):
    """A graph of the run's launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Load:
    """A kernel on another stream for every run: blocks find fewer SMs free, and end at other times."""

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.x, self.y = (torch.zeros(2**23, device="cuda") for _ in range(2))

    def add(self):
        """Enqueue it."""
        with torch.cuda.stream(self.stream):
            torch.neg(self.x, out=self.y)


def race(chain, arena, run, repeats=None, spin=SPIN, load=None):
    """Run with poison before each run and no synchronization; every bit must be what `one_at_a_time` computes."""
    repeats = repeats or REPEATS
    starts = [chain.start(seed) for seed in range(SOURCES)]
    expected = [one_at_a_time(chain, arena, start) for start in starts]
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(repeats):
        arena.poison(i)
        chain.restart(starts[i % SOURCES])
        if load:
            load.add()
        torch.cuda._sleep(spin)
        run()
        wrong += arena.wrong(expected[i % SOURCES])
    torch.cuda.synchronize()
    assert wrong.item() == 0, f"{chain.name}, M={chain.m}: {wrong.item()} wrong bytes in {repeats} runs"


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize(
    ("name", "m", "between"),
    [
        *(("mixed", m, between) for m in (1, 16) for between in BETWEEN),
        *((name, m, "nothing") for name in ("cubin", "cutedsl") for m in (1, 16)),
        ("cutedsl", 5, "kernels"),
    ],
)
def test_chains(mixed, name, m, between, is_captured):
    """Each launch sees all that the ones before wrote, ours or foreign, and overwrites nothing that is still read."""
    chain, arena = chain_in_arena(name, m)
    run = BETWEEN[between](chain)
    repeats = REPEATS if between == "nothing" else max(1, REPEATS // 2)
    if is_captured:
        race(chain, arena, captured(run).replay, repeats)
    else:
        race(chain, arena, run, repeats, SPIN if between == "nothing" else LONG_SPIN)


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
def test_chains_on_a_busy_gpu(mixed, is_captured):
    """Blocks of one kernel end at different times when they share the SMs with another stream's."""
    chain, arena = chain_in_arena("mixed", 16)
    run = plain(chain)
    race(chain, arena, captured(run).replay if is_captured else run, load=Load())


def test_chains_in_one_graph(mixed):
    """Many passes in a graph: the last call of one is followed by the first of the next, with nothing between."""
    passes = 16
    chain, arena = chain_in_arena("mixed", 1)
    start, run = chain.start(), plain(chain)
    chain.restart(start)
    for _ in range(passes):
        for call in chain.calls():
            call()
            torch.cuda.synchronize()
    expected = arena.bytes.clone()
    graph = captured(lambda: [run() for _ in range(passes)])
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(max(1, REPEATS // passes)):
        arena.poison(i)
        chain.restart(start)
        graph.replay()
        wrong += arena.wrong(expected)
    assert wrong.item() == 0, f"{wrong.item()} wrong bytes"


# ---- nothing was called before the capture ----


def first_calls(bundle_dir):
    """The first calls of the process are captured, of every row; then the graphs are raced."""
    hdispatch.load(bundle_dir)
    hdispatch.strict()
    chains = [chain_in_arena(name, m) for name in CHAINS for m in (1, 16)]
    assert not any(count["hits"] for count in hdispatch.stats().values())
    graphs = [captured(plain(chain)) for chain, _ in chains]
    for (chain, arena), graph in zip(chains, graphs, strict=True):
        race(chain, arena, graph.replay, max(1, REPEATS // 10))


def test_first_calls_of_a_fresh_process_are_captured(mixed):
    """CuteDSL's functions load their code on their first call, which a capture does not allow: ours is loaded before."""
    code = "import sys; from gpu.test_mixed_backends import first_calls; first_calls(sys.argv[1])"
    folder = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment["HDISPATCH_BUNDLE"] = str(mixed)
    done = subprocess.run(
        [sys.executable, "-c", code, str(mixed)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_first_calls_of_a_fresh_thread_are_captured(mixed):
    """On a stream that has seen no launch: nothing is known of what may still be written."""
    chain, arena = chain_in_arena("mixed", 16)
    failures = []

    def work():
        try:
            run = plain(chain)
            stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                run()
            with torch.cuda.stream(stream):
                race(chain, arena, graph.replay, max(1, REPEATS // 4))
                race(chain, arena, run, max(1, REPEATS // 4))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]


# ---- weights that one of our own launches has just written ----


@dataclass
class Weights:
    """A launch that writes weights, and a product on a CuteDSL row that reads them before it waits.

    source   what they are made of; `written` is all that is written for them
    """

    source: torch.Tensor
    written: list
    write: functools.partial
    op: str
    sizes: dict
    product: list


def quantized(m):
    """fp8 weights and their scales, by a cubin row."""
    size = {"K": 4096, "N": 4096}
    result, source, scale, _ = given = make("dynamic_per_token_scaled_fp8_quant", "bfloat16", {"K": 4096}, 4096)
    product = make("ll_gemm_fp8", "any", size, m)
    product[2], product[4] = result, scale
    write = functools.partial(hdispatch.ops.dynamic_per_token_scaled_fp8_quant, *given)
    return Weights(source, [result, scale], write, "ll_gemm_fp8", size, product)


def normalized(m):
    """bfloat16 weights, by a cubin row."""
    size = {"K": 4096, "N": 4096}
    result, source, *_ = given = make("rms_norm", "bfloat16+weight", {"K": 4096, "N": 1}, 4096)
    product = make("ll_gemm_bf16", "bfloat16", size, m)
    product[2] = result.view(4096, 4096)
    return Weights(source, [result], functools.partial(hdispatch.ops.rms_norm, *given), "ll_gemm_bf16", size, product)


def multiplied(m):
    """bfloat16 weights, by a CuteDSL row, whose launch may itself begin early."""
    size = {"K": 4096, "N": 32}
    result, source, _ = given = make("ll_gemm_bf16", "bfloat16", {"K": 128, "N": 4096}, 32)
    product = make("ll_gemm_bf16", "bfloat16", size, m)
    product[2] = result
    return Weights(source, [result], functools.partial(hdispatch.ops.ll_gemm_bf16, *given), "ll_gemm_bf16", size, product)


def wrong_products(weights, between, is_captured, repeats):
    """How many outputs are wrong in so many rounds, with other weights in each, and `between` other products before."""
    variant = "any" if weights.op == "ll_gemm_fp8" else "bfloat16"
    m, multiply = weights.product[1].shape[0], getattr(hdispatch.ops, weights.op)
    others = [make(weights.op, variant, weights.sizes, m, seed=seed) for seed in range(between)]
    sources = [torch.randn_like(weights.source) for _ in range(SOURCES)]
    out = weights.product[0]

    def run():
        weights.write()
        for arguments in (*others, weights.product):
            multiply(*arguments)

    expected = []
    for given in sources:
        weights.source.copy_(given)
        weights.write()
        torch.cuda.synchronize()
        run_and_check(weights.op, variant, weights.product, "weights that are there")
        expected.append(out.clone())
    again = captured(run).replay if is_captured else run
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for i in range(repeats):
        weights.source.copy_(sources[i % SOURCES])
        for tensor in (*weights.written, out):
            tensor.view(torch.uint8).fill_(0x7F)  # NaN, or nearly the largest number
        torch.cuda._sleep(SPIN)
        again()
        wrong += (out != expected[i % SOURCES]).sum()
    return wrong.item()


@pytest.mark.parametrize("is_captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("between", [0, 2])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("made", [quantized, normalized, multiplied])
def test_weights_that_were_written_just_before(mixed, made, m, between, is_captured):
    """A CuteDSL row reads its weights before it waits: not while a launch of ours may still write them."""
    repeats = max(1, REPEATS // 4)
    wrong = wrong_products(made(m), between, is_captured, repeats)
    assert wrong == 0, f"{wrong} wrong outputs in {repeats} rounds"


def test_the_race_shows_where_it_is_let(mixed, tmp_path):
    """The same with a bundle that does not say what is read early: were the results right here too, the test above would
    show nothing. A race need not show; then this is skipped."""
    if REPEATS < 500:
        pytest.skip("too few repetitions")
    folder = shutil.copytree(mixed, tmp_path / "unsaid")

    def forget(manifest):
        for record in manifest["records"]:
            if record["launcher"] == "tvm_ffi":
                record.pop("early", None)

    rewrite(folder, forget)
    hdispatch.load(folder)
    try:
        wrong = [wrong_products(quantized(m), between, False, 200) for m in (1, 16) for between in (0, 2)]
    finally:
        hdispatch.load(mixed)
    if not any(wrong):
        pytest.skip("no race showed without the list of early reads: the test above shows less than it could")
