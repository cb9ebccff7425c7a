"""SGLang served from the launch table: kernels that its registry knows, and hooks that let them serve its own calls.

SGLang itself is imported by `plugin.register` alone.
"""

from .functions import FUNCTIONS, Function, OpCall

__all__ = ["FUNCTIONS", "Function", "OpCall"]
