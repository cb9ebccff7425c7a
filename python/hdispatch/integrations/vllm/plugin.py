"""The entry point of vLLM's plug-ins: what HDISPATCH=1 switches on in each of vLLM's processes."""

from __future__ import annotations

import torch

from . import settings
from .override import Override, override_vllm_ops

#: The override that `register` made; kept for the life of the process.
_OVERRIDE: list[Override] = []


def register() -> None:
    """Serve vLLM with hdispatch if HDISPATCH is 1; otherwise do nothing. vLLM calls this in every process, maybe twice.

    Overrides the `_C` ops that the launch table can serve, for every model, and registers classes of our own for the models
    whose decoder layers we run whole (`models.ARCHITECTURES`). The bundle of HDISPATCH_BUNDLE is loaded later, when the model
    is made: only then has a worker chosen its device.

    Raises `HdispatchError` for a wrong HDISPATCH, or where HDISPATCH_BUNDLE names no folder.
    """
    if not settings.is_on() or _OVERRIDE:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        settings.logger.warning("hdispatch: off, since vLLM runs on %s; it serves CUDA", current_platform.device_name)
        return
    settings.bundle_folder()
    from . import models

    models.register()
    _OVERRIDE.append(override_vllm_ops())
    torch.nn.modules.module.register_module_parameter_registration_hook(_on_parameter)


def _on_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:  # noqa: ARG001
    """Load the bundle when a model gets its first CUDA parameter: the one moment that every model passes, after the device."""
    if not _DONE and parameter is not None and parameter.is_cuda:
        settings.load_bundle(parameter.device)
        _DONE.append(True)


_DONE: list[bool] = []
