"""The entry point of vLLM's plug-ins: what HDISPATCH=1 switches on in each of vLLM's processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ... import embedded
from ...errors import HdispatchError
from . import settings, support
from .override import Override, override_vllm_ops

#: The release of vLLM whose layers and ops these are.
VERSION = "0.33"
#: Where vLLM looks for plug-ins, ours among them, and the variable that may leave it out.
GROUP, NAME, ALLOWED = "vllm.general_plugins", "hdispatch", "VLLM_PLUGINS"

#: The override that `register` made; kept for the life of the process.
_OVERRIDE: list[Override] = []


def register() -> None:
    """Serve vLLM with hdispatch if HDISPATCH is 1; otherwise do nothing. vLLM calls this in every process, maybe twice.

    Overrides the `_C` ops that the launch table can serve, for every model, and registers classes of our own for the models
    whose decoder layers we run whole (`models.ARCHITECTURES`), and for all models our model runner (`runner.Runner`) and
    scheduler (`scheduler.DecodeScheduler`). The bundle, HDISPATCH_BUNDLE's or the package's own, is loaded later, when the
    model is made: only then has a worker chosen its device.

    Raises `HdispatchError` for a wrong HDISPATCH, HDISPATCH_ATTENTION, HDISPATCH_REPLAY, HDISPATCH_RUNNER, HDISPATCH_SCHEDULER
    or HDISPATCH_METRICS_PORT, or where HDISPATCH_BUNDLE names nothing, or is not set and the package has no bundle.
    """
    if not settings.is_on() or _OVERRIDE:
        return
    reason = _unfit()
    if reason:
        settings.logger.warning("hdispatch: off: %s", reason)
        return
    embedded.check_any()
    settings.attention()
    settings.replay()
    settings.runner()
    settings.scheduler()
    settings.metrics_port()
    for what, load in PARTS.items():
        part, reason = _load(load)
        if part is None:
            settings.logger.warning("hdispatch: vLLM's own %s: %s", what, reason)
        else:
            part.register()
    _OVERRIDE.append(override_vllm_ops())
    torch.nn.modules.module.register_module_parameter_registration_hook(_on_parameter)


def _on_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:  # noqa: ARG001
    """Load the bundle when a model gets its first CUDA parameter: the one moment that every model passes, after the device."""
    if not _DONE and parameter is not None and parameter.is_cuda:
        settings.load_bundle(parameter.device)
        _DONE.append(True)
        serve_metrics(torch.cuda.current_device() if parameter.device.index is None else parameter.device.index)


_DONE: list[bool] = []


def serve_metrics(device: int) -> None:
    """Add `hdispatch.metrics` to this process's default registry, and serve it where HDISPATCH_METRICS_PORT says so.

    vLLM's /metrics shows the registry of its API server's process. Calls are made and counted in its workers, which are other
    processes, unless the engine runs inside (VLLM_ENABLE_V1_MULTIPROCESSING=0). So a worker has a port of its own: that of the
    variable for cuda:0, the next one for cuda:1, …
    """
    port = settings.metrics_port()
    if importlib.util.find_spec("prometheus_client") is None:
        if port:
            settings.logger.warning("hdispatch: no metrics: pip install 'hdispatch[metrics]' for %s", settings.METRICS_PORT)
        return
    from ... import metrics

    metrics.register()
    if port:
        import prometheus_client

        prometheus_client.start_http_server(port + device)
        settings.logger.info("hdispatch: metrics of cuda:%d on port %d", device, port + device)


def _unfit() -> str:
    """Why this vLLM cannot be served; empty if it can."""
    import vllm
    from vllm.platforms import current_platform

    if not vllm.__version__.startswith(f"{VERSION}."):
        return f"this is vLLM {vllm.__version__}; the plug-in is for {VERSION}"
    if not current_platform.is_cuda():
        return f"vLLM runs on {current_platform.device_name or 'no device that it knows'}; the plug-in is for CUDA"
    return ""


def _layers() -> ModuleType:
    from . import models

    return models


def _runner() -> ModuleType:
    from . import runner

    return runner


def _scheduler() -> ModuleType:
    from . import scheduler

    return scheduler


#: What stays vLLM's own, in the log's words -> the module whose `register` puts ours in its place. It takes names of vLLM's.
PARTS = {"decoder layers stay": _layers, "model runner stays": _runner, "scheduler stays": _scheduler}


def _load(load: Callable[[], ModuleType]) -> tuple[ModuleType | None, str]:
    """A module of `PARTS`, or None and why: this vLLM lacks a name that the module takes. Raises every other fault."""
    try:
        return load(), ""
    except (ImportError, AttributeError) as error:
        where = error.name if isinstance(error, ImportError) else _module_of(error.obj)
        if where is None or where.partition(".")[0] != "vllm":
            raise
        return None, f"{type(error).__name__}: {error}"


def _module_of(found: Any) -> str | None:
    """The name of a module, or of the module of a class."""
    return found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None)


def examine() -> dict[str, Any]:
    """What `register` would do, for `hdispatch doctor`: {"ok", "reason", "version" of vLLM, "models", "decode", "layers",
    "runner", "scheduler"}.

    decode says what attention of decode steps takes: `settings.ATTENTIONS`; layers, runner and scheduler why vLLM's own stay.

    Imports vLLM where it is installed and all else is as it should be, which takes seconds; registers nothing. What speaks
    against one model is known when it is made: vLLM's log says it.
    """
    found: dict[str, Any] = {"ok": False, "reason": "", "version": None, "models": [], "decode": ""}
    found |= {"layers": "", "runner": "", "scheduler": ""}
    try:
        found["version"] = importlib.metadata.version("vllm")
        found["reason"] = _switched_off() or _unfit()
        if found["reason"]:
            return found
        parts = [_load(load) for load in PARTS.values()]
    except importlib.metadata.PackageNotFoundError:
        return found | {"reason": "vLLM is not installed"}
    except HdispatchError as error:
        return found | {"reason": str(error)}
    except Exception as error:  # a broken install fails in any way it likes
        return found | {"reason": f"vLLM cannot be imported: {type(error).__name__}: {error}"}
    if all(part is None for part, _ in parts):
        return found | {"reason": f"vLLM cannot be imported: {parts[0][1]}"}
    reasons = [reason if part is None else part.objection() for part, reason in parts]
    found |= dict(zip(("layers", "runner", "scheduler"), reasons, strict=True))
    found["layers"] = found["layers"] or support.gpu_objection()
    if parts[0][0] is not None and not found["layers"]:
        found["models"] = list(parts[0][0].ARCHITECTURES)
    return found | {"ok": True, "decode": settings.ATTENTIONS[settings.attention()]}


def _switched_off() -> str:
    """Why vLLM would not call `register`, or it would do nothing; empty if neither. `HdispatchError` for wrong settings."""
    if NAME not in {each.name for each in importlib.metadata.entry_points(group=GROUP)}:
        return f"hdispatch's metadata has no entry point in {GROUP}; install it again"
    allowed = os.environ.get(ALLOWED)
    if allowed is not None and NAME not in allowed.split(","):
        return f"{ALLOWED} is {allowed!r}, which leaves {NAME} out"
    if not settings.is_on():
        return f"{settings.SWITCH} is not 1: the plug-in does nothing"
    embedded.check_any()
    settings.attention()
    settings.replay()
    settings.runner()
    settings.scheduler()
    settings.metrics_port()
    return ""
