"""The entry point of SGLang's plug-ins: what HDISPATCH=1 switches on in each of SGLang's processes."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import os
from typing import Any

import torch

from ... import embedded
from ...errors import HdispatchError
from .. import switch
from .functions import FUNCTIONS, Function

#: The release of SGLang whose functions these are: later ones may give a name another meaning.
VERSION = "0.5.23"
#: Where SGLang looks for plug-ins, ours among them, and the variable that may leave it out.
GROUP, NAME, ALLOWED = "sglang.srt.plugins", "hdispatch", "SGLANG_PLUGINS"
#: The variable that names the ops of ours that may serve; all of them if it is not set.
OPS = "HDISPATCH_SGLANG_OPS"

#: A child of SGLang's logger, so that its level and format apply.
logger = logging.getLogger("sglang.hdispatch")

#: The functions that `register` put hooks around; kept for the life of the process.
_SERVED: list[Function] = []
_LOADED: list[bool] = []


def register() -> None:
    """Serve SGLang with hdispatch if HDISPATCH is 1; otherwise do nothing. SGLang calls this in every process, once.

    Registers our kernels in SGLang's kernel registry, and hooks around its functions in its hook registry, which SGLang applies
    next: the registry alone does not choose a kernel. The bundle, HDISPATCH_BUNDLE's or the package's own, is loaded when a
    model is made: only then has a worker chosen its device.

    Raises `HdispatchError`, which SGLang logs before it goes on without us, for a wrong HDISPATCH or HDISPATCH_SGLANG_OPS, or
    where HDISPATCH_BUNDLE names nothing, or is not set and the package has no bundle.
    """
    if not switch.is_on("SGLang") or _SERVED:
        return
    reason = _unfit()
    if reason:
        logger.warning("hdispatch: off: %s", reason)
        return
    embedded.check_any()
    found = {each: objection(each) for each in chosen()}
    _SERVED.extend(each for each, why in found.items() if not why)
    for function, why in found.items():
        if why:
            logger.warning("hdispatch: %s stays SGLang's own: %s", function.target, why)
    if not _SERVED:
        return
    _register_kernels()
    _register_hooks()
    torch.nn.modules.module.register_module_parameter_registration_hook(_on_parameter)
    logger.info("hdispatch: rows of %s serve SGLang's functions", ", ".join(dict.fromkeys(each.op for each in _SERVED)))


def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for function in _SERVED:
        HookRegistry.register(function.target, function.make_hook(), HookType.AROUND)


def _register_kernels() -> None:
    from sglang.kernels import CapabilityRequirement, KernelBackend, KernelSpec, register_kernel

    module = FUNCTIONS[0].__class__.__module__
    for function in _SERVED:
        if function.kernel:
            target = f"{module}:KERNELS.{function.kernel.rpartition('.')[2]}"
            cuda = frozenset({CapabilityRequirement.CUDA})
            register_kernel(KernelSpec(op=function.kernel, backend=KernelBackend.PLUGIN, target=target, capabilities=cuda))


def _on_parameter(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:  # noqa: ARG001
    """Load the bundle when a model gets its first CUDA parameter: the one moment that every model passes, after the device."""
    if not _LOADED and parameter is not None and parameter.is_cuda:
        switch.load_bundle(parameter.device, logger)
        _LOADED.append(True)


def chosen() -> list[Function]:
    """The functions that HDISPATCH_SGLANG_OPS leaves to us. `HdispatchError` for a name of no op that serves any."""
    asked = os.environ.get(OPS, "")
    names = {name.strip() for name in asked.split(",") if name.strip()} or {each.op for each in FUNCTIONS}
    unknown = names - {each.op for each in FUNCTIONS}
    if unknown:
        serving = ", ".join(dict.fromkeys(each.op for each in FUNCTIONS))
        raise HdispatchError(
            f"{OPS} is {asked!r}; no function of SGLang is served by {', '.join(sorted(unknown))}, but by {serving}"
        )
    return [each for each in FUNCTIONS if each.op in names]


def find(name: str) -> Any:
    """The module, or the class of one, of a dotted name.

    What a module's own imports raise is raised; `pkgutil.resolve_name` would say that the package lacks the module.
    """
    module = name
    inner: list[str] = []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            if "." not in module or not f"{module}.".startswith(f"{error.name}."):
                raise
            module, _, last = module.rpartition(".")
            inner.insert(0, last)
    for each in inner:
        found = getattr(found, each)
    return found


def objection(function: Function) -> str:
    """Why a function of SGLang's cannot be served: it is not there, or has other parameters; empty if it can. Imports it."""
    holder, _, name = function.target.rpartition(".")
    try:
        parameters = _parameters(getattr(find(holder), name))[int(function.is_method) :]
    except (ImportError, AttributeError) as error:
        return f"it cannot be imported: {error}"
    except (TypeError, ValueError) as error:
        return f"its parameters are not known: {error}"
    expected = _parameters(function.call)
    if parameters == expected:
        return ""
    return f"its parameters are ({', '.join(map(str, parameters))}); expected ({', '.join(map(str, expected))})"


def _parameters(function: Any) -> list[inspect.Parameter]:
    """A function's parameters, without the annotations."""
    return [each.replace(annotation=inspect.Parameter.empty) for each in inspect.signature(function).parameters.values()]


def _unfit() -> str:
    """Why this SGLang cannot be served; empty if it can."""
    version = importlib.metadata.version("sglang")
    if version.partition("+")[0] != VERSION:
        return f"this is SGLang {version}; the plug-in is for {VERSION}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "torch sees no CUDA device; the plug-in is for CUDA"
    return ""


def examine() -> dict[str, Any]:
    """What `register` would do, for `hdispatch doctor`: {"ok", "reason", "version" of SGLang, "ops", "left" to SGLang's own}.

    left    the functions that stay SGLang's own -> why

    Imports SGLang where it is installed and all else is as it should be, which takes seconds; registers nothing.
    """
    found: dict[str, Any] = {"ok": False, "reason": "", "version": None, "ops": [], "left": {}}
    try:
        found["version"] = importlib.metadata.version("sglang")
        found["reason"] = _switched_off() or _unfit()
        if found["reason"]:
            return found
        import sglang.srt.plugins  # noqa: F401

        objections = {each: objection(each) for each in chosen()}
    except importlib.metadata.PackageNotFoundError:
        return found | {"reason": "SGLang is not installed"}
    except HdispatchError as error:
        return found | {"reason": str(error)}
    except Exception as error:  # a broken install fails in any way it likes
        return found | {"reason": f"SGLang cannot be imported: {type(error).__name__}: {error}"}
    found["left"] = {each.target: why for each, why in objections.items() if why}
    found["ops"] = list(dict.fromkeys(each.op for each, why in objections.items() if not why))
    return found | ({"ok": True} if found["ops"] else {"reason": "; ".join(f"{k}: {v}" for k, v in found["left"].items())})


def _switched_off() -> str:
    """Why SGLang would not call `register`, or it would do nothing; empty if neither. `HdispatchError` for wrong settings."""
    if NAME not in {each.name for each in importlib.metadata.entry_points(group=GROUP)}:
        return f"hdispatch's metadata has no entry point in {GROUP}; install it again"
    allowed = os.environ.get(ALLOWED)
    if allowed and NAME not in {each.strip() for each in allowed.split(",")}:
        return f"{ALLOWED} is {allowed!r}, which leaves {NAME} out"
    if not switch.is_on("SGLang"):
        return f"{switch.SWITCH} is not 1: the plug-in does nothing"
    embedded.check_any()
    chosen()
    return ""
