"""vLLM served from the launch table: its CUDA ops replaced one by one (`override`), and whole decoder layers (`plugin`).

vLLM itself is imported by `plugin.register` and what it brings in, never by this module.
"""

from ...opspec import Form
from .override import ROUTES, Override, Route, override_vllm_ops

__all__ = ["ROUTES", "Form", "Override", "Route", "override_vllm_ops"]
