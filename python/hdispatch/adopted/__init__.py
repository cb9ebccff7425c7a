"""Serving kernels that their users have already written: `adopt`, from C++ after the first call of a key.

triton_state.py    what a compiled kernel depends on beside a call's arguments: knobs, hooks, captured globals
triton_kernel.py   a Triton kernel, autotuned or with heuristics: its parameters, and what Triton compiled as a row
adoption.py        adopt and unadopt, for one kernel or for all of the process
"""

from .adoption import adopt, adopting, unadopt

__all__ = ["adopt", "adopting", "unadopt"]
