"""Launch compiled Helion, Triton and CuteDSL kernels from a frozen C++ table, with no Python per launch.

    import hdispatch
    hdispatch.load("bundle")
    hdispatch.ops.rms_norm_dynamic_per_token_quant(out, x, weight, scale, 1e-6, None, residual)

Importing compiles nothing, opens no bundle and touches no GPU. The build wing is `hdispatch.compile`.
"""

from . import extension as _extension

if _problem := _extension.problem():
    _extension.refuse(_problem)

from . import ops, registry
from .adopted import adopt, adopting, unadopt
from .bundle_reader import read_bundle
from .errors import (
    ArgumentError,
    BuildError,
    BundleError,
    DriverError,
    FunctionError,
    HdispatchError,
    MissError,
)
from .functions import Key
from .integrations.vllm import override_vllm_ops
from .recording import record
from .replay import Replays
from .runtime import Bundle, Registration, explain, load, loaded, register, registered, set_strict, stats, strict
from .sdpa import AttentionChoice, attention, select_attention
from .sequence import Arena, Sequence

__version__ = "0.1.0"

__all__ = [
    "Arena",
    "ArgumentError",
    "AttentionChoice",
    "BuildError",
    "Bundle",
    "BundleError",
    "DriverError",
    "FunctionError",
    "HdispatchError",
    "Key",
    "MissError",
    "Registration",
    "Replays",
    "Sequence",
    "adopt",
    "adopting",
    "attention",
    "explain",
    "load",
    "loaded",
    "ops",
    "override_vllm_ops",
    "read_bundle",
    "record",
    "register",
    "registered",
    "registry",
    "select_attention",
    "set_strict",
    "stats",
    "strict",
    "unadopt",
]
