"""vLLM's real engine on CPU tensors: a platform that says it is an H200, Triton interpreted, torch.cuda's streams mocked.

Import before vLLM, in a process of its own. Only kernels are stand-ins; loader, scheduler, KV cache, model runner and sampler
are vLLM's.
"""

from __future__ import annotations

import contextlib
import os
import types
from typing import Any

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
os.environ.update(VLLM_USE_DEEP_GEMM="0", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_WORKER_MULTIPROC_METHOD="fork")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import simulated_ops
import torch

MEMORY = (8 << 30, 16 << 30)  # free and total, bytes


class Stream:
    """A stream on which everything has happened."""

    cuda_stream, device = 0, torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


class Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _nothing(*_: Any, **__: Any) -> None: ...


def mock_cuda(devices: int) -> None:
    """torch.cuda and torch.accelerator, as far as vLLM's engine asks them."""
    stream, cuda, accelerator = Stream(), torch.cuda, torch.accelerator
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_: stream
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.set_stream = cuda.synchronize = cuda.init = _nothing
    cuda.device_count = accelerator.device_count = lambda: devices
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda *_: "simulated"
    cuda.max_memory_allocated = lambda *_: 0
    cuda.is_current_stream_capturing = lambda: False
    cuda.mem_get_info = accelerator.get_memory_info = lambda *_: MEMORY
    cuda.memory.get_allocator_backend = lambda: "mock"
    accelerator.synchronize = accelerator.empty_cache = accelerator.set_device_index = _nothing
    accelerator.reset_peak_memory_stats = cuda.reset_peak_memory_stats = cuda.empty_cache = _nothing
    accelerator.memory_stats = lambda *_: {}
    accelerator.memory_allocated = accelerator.max_memory_allocated = lambda *_: 0
    zeros = torch.zeros

    def zeros_here(*a: Any, **k: Any) -> torch.Tensor:
        return zeros(*a, **{**k, "device": "cpu"}) if str(k.get("device", "")).startswith("cuda") else zeros(*a, **k)

    torch.zeros = zeros_here


def mock_platform(devices: int, custom_all_reduce: bool) -> None:
    """vLLM's CUDA platform over CPU tensors."""
    import vllm.platforms as platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    class SimulatedCuda(cuda.NonNvmlCudaPlatform):
        device_type = "cpu"
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(9, 0))
        get_device_name = classmethod(lambda cls, device_id=0: "NVIDIA H200")
        get_device_total_memory = classmethod(lambda cls, device_id=0: 141 << 30)
        num_compute_units = classmethod(lambda cls, device_id=0: 132)
        import_kernels = classmethod(lambda cls: None)
        is_pin_memory_available = classmethod(lambda cls: False)
        opaque_attention_op = classmethod(lambda cls: False)
        get_current_memory_usage = classmethod(lambda cls, device=None: 0.0)
        set_device = classmethod(lambda cls, device: None)
        synchronize = classmethod(lambda cls, *a: None)
        manual_seed_all = classmethod(lambda cls, seed: None)
        device_count = classmethod(lambda cls: devices)

    if devices > 1:
        base = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
        communicator = f"{__name__}.SimulatedCommunicator" if custom_all_reduce else base
        SimulatedCuda.get_device_communicator_cls = classmethod(lambda cls: communicator)
        SimulatedCuda.use_custom_op_collectives = classmethod(lambda cls: False)
    platforms._current_platform = SimulatedCuda()


def mock_custom_all_reduce() -> None:
    """A communicator of vLLM's with a custom all-reduce, whose memory is this process's own."""
    from vllm.distributed.device_communicators import cuda_wrapper
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    class SimulatedCommunicator(DeviceCommunicatorBase):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            if "tp" not in self.unique_name:
                return
            self.memory = torch.zeros(8 << 20, dtype=torch.uint8)
            self.ca_comm = types.SimpleNamespace(
                group=self.cpu_group,
                rank=self.rank_in_group,
                world_size=self.world_size,
                meta_ptrs=[0] * self.world_size,
                buffer_ptrs=[self.memory.data_ptr()] * self.world_size,
                fully_connected=True,
                max_size=self.memory.numel(),
                device=torch.device("cpu"),
                disabled=False,
                mnnvl_only=False,
                should_custom_ar=lambda _: True,
            )

    class CudaRTLibrary:
        def cudaIpcGetMemHandle(self, _: Any) -> bytes:
            return bytes(128)

    globals()["SimulatedCommunicator"] = SimulatedCommunicator
    cuda_wrapper.CudaRTLibrary = CudaRTLibrary


def mock_worker() -> type:
    """vLLM's worker on the CPU, and no schedule of FlashAttention."""
    import vllm.v1.attention.backends.flash_attn as flash_attn
    import vllm.v1.worker.gpu_worker as gpu_worker
    from vllm.config import set_current_vllm_config

    flash_attn.FlashAttentionMetadataBuilder._get_scheduler_metadata = lambda self, **_: None
    gpu_worker.kernel_warmup = _nothing

    class SimulatedWorker(gpu_worker.Worker):
        def init_device(self) -> None:
            self.device = torch.device("cpu")
            gpu_worker.init_worker_distributed_environment(
                self.vllm_config, self.rank, self.distributed_init_method, self.local_rank, "gloo"
            )
            gpu_worker.set_random_seed(0)
            self.init_snapshot = type("Snapshot", (), {"free_memory": MEMORY[0], "total_memory": MEMORY[1]})()
            self._init_workspace_and_model_runner()

        def determine_available_memory(self) -> int:
            self.model_runner._dummy_sampler_run = _nothing
            with set_current_vllm_config(self.vllm_config):
                self.model_runner.profile_run()
            return 64 << 20

    return SimulatedWorker


def mock_lora() -> None:
    """LoRA's kernels, where no adapter is loaded: there is nothing to add."""
    import vllm.lora.ops.triton_ops  # noqa: F401

    for name in ("lora_shrink", "lora_expand"):
        torch.library.impl(f"vllm::{name}", "CPU")(_nothing)


def start(devices: int = 1, custom_all_reduce: bool = False) -> type:
    """Everything, and vLLM's LLM; with a custom all-reduce of vLLM's on request."""
    torch.set_num_threads(1)
    mock_cuda(devices)
    simulated_ops.define()
    mock_platform(devices, custom_all_reduce)
    if custom_all_reduce:
        simulated_ops.define_custom_all_reduce()
        mock_custom_all_reduce()
    worker = mock_worker()
    globals()["SimulatedWorker"] = worker
    worker.__module__, worker.__qualname__ = __name__, "SimulatedWorker"
    import vllm

    return vllm.LLM
