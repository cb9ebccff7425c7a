"""Sums over tensor parallel ranks as steps of a sequence: vLLM's custom all-reduce, which a replayed CUDA graph may hold.

Its kernel adds up memory that each rank shares with all others: what a rank sums, a product writes there. The kernels of the
ranks meet on the GPUs, whether one was launched and another is part of a graph; so each rank captures and replays when it can,
and no rank waits for another on the host.

A captured kernel reads the shared memory's addresses from a table, whose entries vLLM fills in after its own captures by an
exchange that all ranks have to enter together. Here each rank says once, in the store of its process group, where its memory
is; with that a rank fills in the entries of its captures by itself. The table is our own: vLLM's captures find theirs as they
left it.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch

from ...errors import HdispatchError
from ...sequence import Sequence, SequenceInteger, SequenceTensor

#: Bytes of a table. An entry has 128, for 16 addresses; a step of 36 layers has 72 entries for each graph.
TABLE_BYTES = 8 << 20
ENTRY_BYTES = 128
#: Bytes of a cudaIpcMemHandle_t.
HANDLE_BYTES = 64
#: Before the rank, in the store.
KEY = "hdispatch/custom all-reduce/"


def objection(communicator: Any) -> str | None:
    """Why vLLM would not sum a small 16-bit tensor by its custom all-reduce; None if it would.

    communicator  vLLM's device communicator of the tensor parallel group
    """
    others = {
        "fi_ar_comm": "FlashInfer's; VLLM_ALLREDUCE_USE_FLASHINFER=0 takes the custom one",
        "fi_pcie_ipc_ar_comm": "FlashInfer's over PCIe; VLLM_ALLREDUCE_USE_FLASHINFER_PCIE_IPC=0 takes the custom one",
        "qr_comm": "the quick one",
    }
    for name, whose in others.items():
        other = getattr(communicator, name, None)
        if other is not None and not other.disabled:
            return f"vLLM's all-reduce is {whose}"
    if getattr(communicator, "aiter_ar_comm", None) is not None:
        return "vLLM's all-reduce is AITER's"
    custom = getattr(communicator, "ca_comm", None)
    if custom is None or custom.disabled:
        return "vLLM's custom all-reduce is off"
    if custom.mnnvl_only:
        return "ranks are on several hosts"
    return None


class CustomAllReduce:
    """vLLM's custom all-reduce of one tensor parallel group, for the steps of one model. Use it on one thread.

    communicator  vLLM's device communicator of the group, for which `objection` has none
    own_handle    cudaIpcMemHandle_t of this rank's shared memory
    hidden, dtype  of the rows that are summed

    memory  this rank's shared memory as rows, [rows, hidden]: what is to be summed is written there
    """

    def __init__(self, communicator: Any, own_handle: bytes, hidden: int, dtype: torch.dtype) -> None:
        custom = communicator.ca_comm
        self._communicator = weakref.ref(communicator)  # vLLM ends it, and its memory with it, when nobody has it any more
        self._store, self._rank, self._ranks = custom.group.get_group_store(), custom.rank, custom.world_size
        self._signals, self._buffers, self._connected = custom.meta_ptrs, custom.buffer_ptrs, custom.fully_connected
        row_bytes = hidden * dtype.itemsize
        rows = (custom.max_size - 1) // row_bytes  # vLLM takes it for less than max_size
        address = self._buffers[self._rank]
        self.memory = _memory_at(address, rows * row_bytes, custom.device).view(dtype).view(rows, hidden)
        if not custom.should_custom_ar(self.memory[:1]):
            self.memory = self.memory[:0]
        self._handles: list[list[int]] | None = None
        self._store.set(KEY + str(self._rank), own_handle)
        self._new_table()

    def is_of(self, communicator: Any) -> bool:
        """Whether it was made with this communicator."""
        return self._communicator() is communicator

    def objection(self) -> str | None:
        """The reason why the custom all-reduce cannot take a step's sums now."""
        communicator = self._communicator()
        return "vLLM has ended the communicator" if communicator is None else objection(communicator)

    # ---- sums ----

    def handle(self) -> int:
        """The handle that `add` takes: from vLLM's table under a capture by vLLM, which fills it in; else from ours."""
        communicator = self._communicator()
        assert communicator is not None
        if torch.cuda.is_current_stream_capturing():
            return int(communicator.ca_comm._ptr)
        return self._handle

    def add(self, s: Sequence, handle: SequenceInteger, shared: SequenceTensor, total: SequenceTensor) -> None:
        """A step that puts the sum of `shared`, a slot with rows of `memory`, over all ranks in `total`."""
        s.add_torch(torch.ops._C_custom_ar.all_reduce.default, handle, shared, total, 0, 0)

    def sum(self, rows: int, out: torch.Tensor) -> None:
        """The sum of the first rows of `memory` over all ranks, in `out`."""
        torch.ops._C_custom_ar.all_reduce(self.handle(), self.memory[:rows], out, 0, 0)

    # ---- captures of ours ----

    def may_begin(self) -> bool:
        """Whether a capture may be made: every rank has said where its memory is, and the table has room."""
        if not self._has_room():
            self._new_table()
            return False  # this call has the handle of the former table
        return self._peers() is not None

    def is_ready(self) -> bool:
        """What `may_begin` would say, without a new table."""
        return self._has_room() and self._peers() is not None

    def _has_room(self) -> bool:
        return self._left >= TABLE_BYTES // ENTRY_BYTES // 8  # more than any model's step takes

    def ended(self) -> None:
        """Fill in the entries of what was captured, be it broken, before a graph of it runs."""
        handles, offsets = torch.ops._C_custom_ar.get_graph_buffer_ipc_meta(self._handle)
        count, peers = len(offsets), self._peers()
        if count == 0:
            return
        assert peers is not None
        self._left -= count
        zeros = [[0] * count] * self._ranks
        torch.ops._C_custom_ar.register_graph_buffers(self._handle, [each * count for each in peers], zeros)
        if any(offsets) or len(handles) != count * HANDLE_BYTES:
            raise HdispatchError(
                f"hdispatch: a captured sum is over memory at {max(offsets)} bytes from where the ranks share theirs, with "
                f"{len(handles)} bytes of {count} handles; expected 0 and {count * HANDLE_BYTES}. Set HDISPATCH_REPLAY=0 and "
                "report this configuration"
            )

    def _peers(self) -> list[list[int]] | None:
        """The handle of each rank's memory, in bytes; None until every rank has published its handle. Does not wait."""
        if self._handles is None:
            keys = [KEY + str(rank) for rank in range(self._ranks)]
            if self._store.check(keys):
                self._handles = [list(self._store.get(key)) for key in keys]
        return self._handles

    def _new_table(self) -> None:
        """Graphs of a former table are never replayed: their calls had its handle.

        Not disposed of: that would close the peers' memory, which vLLM has open too.
        """
        library = torch.ops._C_custom_ar
        table = torch.empty(TABLE_BYTES, dtype=torch.uint8, device=self.memory.device)
        self._handle = int(library.init_custom_ar(self._signals, table, self._rank, self._connected))
        library.register_buffer(self._handle, self._buffers)
        self._left = TABLE_BYTES // ENTRY_BYTES - 1
        if self.memory.is_cuda and getattr(self, "_table", None) is not None:
            torch.cuda.synchronize(self.memory.device)  # a graph of the former table may be running
        self._table = table


class _Bytes:
    """Device memory for torch.as_tensor, which does not own it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def _memory_at(address: int, size: int, device: torch.device) -> torch.Tensor:
    """uint8 [size] at an address."""
    if device.type == "cuda":
        return torch.as_tensor(_Bytes(address, size), device=device)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)
