"""Sums over ranks as steps of a sequence: two threads as ranks, stand-ins of vLLM's custom all-reduce and of CUDA graphs."""

from __future__ import annotations

import contextlib
import random
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hdispatch import HdispatchError, Sequence, replay
from hdispatch.integrations.vllm import all_reduce
from hdispatch.integrations.vllm.all_reduce import CustomAllReduce, objection

RANKS, HIDDEN, MAX_SIZE = 2, 16, 8192
#: Of a rank that waits for another one: then the test fails.
LIMIT_S = 20


class Namespace(SimpleNamespace):
    """With weak references, as objects of vLLM's."""


class _Table:
    """What vllm::CustomAllreduce has: entries with the ranks' addresses, and inputs captured since they were filled in."""

    def __init__(self, rank: int) -> None:
        self.rank, self.entries, self.base, self.registered, self.captured = rank, {}, 0, {}, []


class _World:
    """Ranks whose kernels meet; memory by handle; what threads capture."""

    def __init__(self) -> None:
        self.memory = [torch.full((MAX_SIZE,), 255, dtype=torch.uint8) for _ in range(RANKS)]
        self.tables: list[_Table] = []
        self.met = threading.Barrier(RANKS, timeout=LIMIT_S)
        self.mine = threading.local()  # .graph, while it is captured
        self.store = dist.HashStore()
        self.launched, self.registered = [0] * RANKS, 0

    def communicator(self, rank: int, **changes: object) -> Namespace:
        custom = Namespace(
            group=SimpleNamespace(get_group_store=lambda: self.store),
            rank=rank,
            world_size=RANKS,
            meta_ptrs=[0] * RANKS,
            buffer_ptrs=[each.data_ptr() for each in self.memory],
            fully_connected=True,
            max_size=MAX_SIZE,
            device=torch.device("cpu"),
            disabled=False,
            mnnvl_only=False,
            should_custom_ar=lambda _: True,
            _ptr=-1,
        )
        vars(custom).update({name: changes.pop(name) for name in list(changes) if hasattr(custom, name)})
        return Namespace(**({"ca_comm": custom, "fi_ar_comm": None, "qr_comm": None, "aiter_ar_comm": None} | changes))

    def record(self, work) -> None:
        graph = getattr(self.mine, "graph", None)
        work() if graph is None else graph.append(work)

    # ---- the ops ----

    def init_custom_ar(self, signals, table, rank, connected) -> int:
        assert len(signals) == RANKS
        assert table.dtype is torch.uint8
        assert connected
        self.tables.append(_Table(rank))
        self.tables[-1].room = table.numel() // all_reduce.ENTRY_BYTES
        return len(self.tables) - 1

    def register_buffer(self, handle, addresses) -> None:
        table = self.tables[handle]
        table.registered[addresses[table.rank]] = table.base
        self.fill_in(table, addresses)

    def fill_in(self, table, addresses) -> None:
        assert table.base < table.room
        table.entries[table.base] = list(addresses)
        table.base += 1

    def all_reduce(self, handle, given, out, buffer, size) -> None:
        assert buffer == size == 0
        table, count = self.tables[handle], given.numel()
        if getattr(self.mine, "graph", None) is not None:
            entry = table.base + len(table.captured)
            table.captured.append(given.data_ptr())
        else:
            entry = table.registered[given.data_ptr()]  # KeyError: not registered
            self.launched[table.rank] += 1

        def kernel() -> None:
            addresses = table.entries[entry]
            self.met.wait()
            parts = [all_reduce._memory_at(a, 4 * count, out.device).view(torch.float32) for a in addresses]
            total = torch.stack(parts).sum(0)
            self.met.wait()
            out.copy_(total.view_as(out))

        self.record(kernel)

    def meta(self, handle) -> tuple[list[int], list[int]]:
        table = self.tables[handle]
        start = self.memory[table.rank].data_ptr()
        return [table.rank] * 64 * len(table.captured), [a - start for a in table.captured]

    def register(self, handle, handles, offsets) -> None:
        table = self.tables[handle]
        for at in range(len(table.captured)):
            starts = [self.memory[each[64 * at]].data_ptr() for each in handles]
            self.fill_in(table, [a + rank[at] for a, rank in zip(starts, offsets, strict=True)])
        self.registered += len(table.captured)
        table.captured = []


@pytest.fixture
def world(monkeypatch):
    """Ranks without a GPU; tensors of `OnGpu` and graphs that record what the stand-ins do."""
    made = _World()
    with torch.library._scoped_library("_C_custom_ar", "FRAGMENT") as library:
        library.define("init_custom_ar(int[] ipc_tensors, Tensor rank_data, int rank, bool fully_connected) -> int")
        library.define("register_buffer(int fa, int[] ipc_tensors) -> ()")
        library.define("all_reduce(int fa, Tensor inp, Tensor! out, int reg_buffer, int reg_buffer_sz_bytes) -> ()")
        library.define("get_graph_buffer_ipc_meta(int fa) -> (int[], int[])")
        library.define("register_graph_buffers(int fa, int[][] handles, int[][] offsets) -> ()")
        for name, function in (
            ("init_custom_ar", made.init_custom_ar),
            ("register_buffer", made.register_buffer),
            ("all_reduce", made.all_reduce),
            ("get_graph_buffer_ipc_meta", made.meta),
            ("register_graph_buffers", made.register),
        ):
            library.impl(name, function, "CompositeExplicitAutograd")
        mock_graphs(monkeypatch, made)
        yield made


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    device = property(lambda _: torch.device("cuda", 0))
    __torch_function__ = torch._C._disabled_torch_function_impl


def mock_graphs(monkeypatch, world) -> None:
    class Graph:
        def capture_begin(self, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"
            world.mine.graph = self.recorded = []

        def capture_end(self) -> None:
            world.mine.graph = None

        def replay(self) -> None:
            for work in self.recorded:
                work()

    stream = SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0), synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(replay.Replays, "_hits", lambda self: self.sequence.hits)


class Broken(Exception):
    """What a step of a test raises."""


class _Step:
    """A rank's step of two sums: x -> sum over ranks of x + 1 -> sum over ranks of twice that. Called as a sequence is."""

    name = "step"

    def __init__(self, world: _World, rank: int) -> None:
        self.world, self.rank, self.hits = world, rank, 0
        self.is_served, self.breaks, self.broken = True, False, 0
        self.communicator = world.communicator(rank)
        self.sums = CustomAllReduce(self.communicator, bytes([rank]) * 64, HIDDEN, torch.float32)
        self.replays = replay.Replays(self, most=3, around=self.sums)

    def __call__(self, x, out, shared, handle) -> None:
        record, op = self.world.record, torch.ops._C_custom_ar.all_reduce
        plain = [each.as_subclass(torch.Tensor) for each in (x, out, shared)]
        x, out, shared = plain
        record(lambda: shared.copy_(x + 1))
        op(handle, shared, out, 0, 0)
        if self.breaks and getattr(self.world.mine, "graph", None) is not None:
            self.broken += 1
            raise Broken
        record(lambda: shared.copy_(2 * out))
        op(handle, shared, out, 0, 0)
        self.hits += self.is_served

    def note_replay(self, *_slots) -> None:
        self.hits += 1

    def run(self, x, out) -> None:
        slots = (*(each.as_subclass(OnGpu) for each in (x, out, self.sums.memory[: x.size(0)])), self.sums.handle())
        try:
            self.replays(*slots)
        except Broken:  # nothing has run
            self.replays(*slots)


def run_ranks(world: _World, rank_steps) -> list[_Step]:
    """Runs rank_steps(step, rank) of each rank in a thread; nothing hangs."""
    steps = [_Step(world, rank) for rank in range(RANKS)]
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            rank_steps(steps[rank], rank)
        except BaseException as error:
            errors.append(error)
            world.met.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(RANKS)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(4 * LIMIT_S)
    assert not any(each.is_alive() for each in threads)
    if errors:
        raise errors[0]
    return steps


def inputs(call: int, rows: int) -> list[torch.Tensor]:
    return [torch.full((rows, HIDDEN), float(7 * call + rank)) for rank in range(RANKS)]


def check_call(step: _Step, rank: int, call: int, x: torch.Tensor, out: torch.Tensor) -> None:
    """One call with new values in the memory of x; the right sum in out."""
    given = inputs(call, x.size(0))
    x.copy_(given[rank])
    out.fill_(float("nan"))
    step.run(x, out)
    assert torch.equal(out, 2 * RANKS * sum(each + 1 for each in given)), (rank, call)


def memory(rows: int) -> list[torch.Tensor]:
    return [torch.empty(rows, HIDDEN) for _ in range(2)]


def test_ranks_replay_what_comes_again(world):
    def calls(step, rank):
        x, out = memory(5)
        for call in range(10):
            check_call(step, rank, call, x, out)

    for step in run_ranks(world, calls):
        assert (step.replays.captures, step.replays.replays) == (1, 8)
    assert world.registered == 2 * RANKS
    assert world.launched == [4, 4]


def rank_is_never_served(step):
    step.is_served = False


def rank_breaks_in_captures(step):
    step.breaks = True


def rank_has_its_own_replays_off(step):
    step.replays._around = SimpleNamespace(may_begin=lambda: False)


@pytest.mark.parametrize("disturb", [rank_is_never_served, rank_breaks_in_captures, rank_has_its_own_replays_off])
def test_a_rank_that_cannot_replay_meets_one_that_does(world, disturb):
    def calls(step, rank):
        if rank == 1:
            disturb(step)
        x, out = memory(3)
        for call in range(12):
            check_call(step, rank, call, x, out)

    first, second = run_ranks(world, calls)
    assert (first.replays.captures, first.replays.replays) == (1, 10)
    assert (second.replays.captures, second.replays.replays) == (0, 0)
    assert (second.broken > 1) is second.breaks
    assert all(not table.captured for table in world.tables)  # broken captures leave nothing


def test_a_rank_whose_memory_moves_meets_one_that_replays(world):
    def calls(step, rank):
        kept = [memory(4)]
        for call in range(12):
            if rank == 1 and call % 4 == 3:
                kept.append(memory(4))
            check_call(step, rank, call, *kept[-1])

    first, second = run_ranks(world, calls)
    assert first.replays.captures == 1
    assert second.replays.captures == 3


def test_ranks_wait_for_nobodys_handle(world):
    """A rank that has not said where its memory is: the others launch, until it has."""
    said = world.store
    world.store = SimpleNamespace(set=said.set, get=said.get, check=lambda keys: world.is_known and said.check(keys))
    world.is_known = False

    def calls(step, rank):
        x, out = memory(2)
        for call in range(12):
            if call == 6:
                assert step.replays.captures == 0
                world.met.wait()
                world.is_known = True
            check_call(step, rank, call, x, out)

    for step in run_ranks(world, calls):
        assert (step.replays.captures, step.replays.replays) == (1, 6)


def test_a_full_table_is_followed_by_another(world, monkeypatch):
    monkeypatch.setattr(all_reduce, "TABLE_BYTES", 16 * all_reduce.ENTRY_BYTES)
    monkeypatch.setattr(replay, "IDLE_CALLS", 1)

    def calls(step, rank):
        kept = []
        for call in range(120):
            if call % 4 == 0:
                kept.append(memory(2))
            check_call(step, rank, call, *kept[-1])

    steps = run_ranks(world, calls)
    assert len(world.tables) > 2 * RANKS
    for step in steps:
        assert step.replays.captures >= 20
        assert step.sums._left >= 0


def test_many_steps_of_ranks_that_are_disturbed_at_random(world, monkeypatch):
    """Batch sizes change; each rank for itself moves memory, is not served, breaks in captures, drops graphs."""
    monkeypatch.setattr(replay, "IDLE_CALLS", 5)
    monkeypatch.setattr(all_reduce, "TABLE_BYTES", 64 * all_reduce.ENTRY_BYTES)
    sizes = random.Random(0).choices([1, 2, 3, 7, 64], k=300)

    def calls(step, rank):
        chance, kept = random.Random(1 + rank), {}
        for call, rows in enumerate(sizes):
            if rows not in kept or chance.random() < 0.05:
                kept[rows] = memory(rows)
            step.is_served, step.breaks = chance.random() > 0.1, chance.random() < 0.1
            check_call(step, rank, call, *kept[rows])

    for step in run_ranks(world, calls):
        assert step.replays.replays > 50
        assert step.broken > 0
        assert step.replays.captures > 3


def test_memory_that_the_ranks_do_not_share_is_no_input_of_a_captured_sum(world):
    step = _Step(world, 0)
    CustomAllReduce(world.communicator(1), bytes([1]) * 64, HIDDEN, torch.float32)
    assert step.sums.may_begin()
    world.tables[step.sums._handle].captured = [world.memory[0].data_ptr() + 32]
    with pytest.raises(HdispatchError, match=r"at 32 bytes from where the ranks share theirs.*HDISPATCH_REPLAY=0"):
        step.sums.ended()
    assert not world.tables[step.sums._handle].captured


def test_a_sum_is_a_step_of_a_sequence(world):
    """In out form, and nothing of the arena is what the ranks share."""

    def calls(step, rank):
        s = Sequence(f"sum of rank {rank}")
        x = s.slot("x", ("M", HIDDEN), torch.float32)
        shared, out = (s.slot(name, ("M", HIDDEN), torch.float32, written=True) for name in ("shared", "out"))
        handle = s.int_slot("handle")
        s.add_torch(torch.ops.aten.copy_.default, shared, x)
        step.sums.add(s, handle, shared, out)
        frozen = s.freeze()
        for call, rows in enumerate((1, 4, 127)):
            given = inputs(call, rows)
            found = torch.full((rows, HIDDEN), float("nan"))
            frozen(given[rank], step.sums.memory[:rows], found, step.sums.handle())
            assert torch.equal(found, sum(given))
            found.fill_(float("nan"))
            step.sums.sum(rows, found)
            assert torch.equal(found, sum(given))

    run_ranks(world, calls)


def test_rows_that_fit(world):
    """vLLM's custom all-reduce takes less than max_size; none where it refuses the type or the ranks' connection."""
    assert CustomAllReduce(world.communicator(0), bytes(64), HIDDEN, torch.float32).memory.shape == (127, HIDDEN)
    assert CustomAllReduce(world.communicator(0), bytes(64), HIDDEN, torch.bfloat16).memory.shape == (255, HIDDEN)
    refusing = world.communicator(0, should_custom_ar=lambda _: False)
    assert CustomAllReduce(refusing, bytes(64), HIDDEN, torch.float32).memory.shape == (0, HIDDEN)


def test_another_all_reduce_of_vllms_comes_first(world):
    on, off = SimpleNamespace(disabled=False), SimpleNamespace(disabled=True)
    assert objection(world.communicator(0)) is None
    assert objection(world.communicator(0, fi_ar_comm=off, qr_comm=off)) is None
    assert "VLLM_ALLREDUCE_USE_FLASHINFER=0" in objection(world.communicator(0, fi_ar_comm=on))
    assert "quick" in objection(world.communicator(0, qr_comm=on))
    assert "AITER" in objection(world.communicator(0, aiter_ar_comm=on))
    assert "off" in objection(world.communicator(0, ca_comm=None))
    assert "off" in objection(world.communicator(0, disabled=True))
    assert "hosts" in objection(world.communicator(0, mnnvl_only=True))
    assert "off" in objection(SimpleNamespace())


def test_a_communicator_that_vllm_has_ended(world):
    communicator = world.communicator(0)
    sums = CustomAllReduce(communicator, bytes(64), HIDDEN, torch.float32)
    assert sums.is_of(communicator)
    assert sums.objection() is None
    del communicator
    assert "ended" in sums.objection()


def test_a_capture_of_vllms_has_vllms_table(world, monkeypatch):
    """Which vLLM fills in after it, with all ranks."""
    communicator = world.communicator(0)
    sums = CustomAllReduce(communicator, bytes(64), HIDDEN, torch.float32)
    own = sums.handle()
    assert own != communicator.ca_comm._ptr
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert sums.handle() == communicator.ca_comm._ptr
