"""Serving kernels that their users have already written: `adopt`, from C++ after the first call of a key.

triton_state.py    what a compiled kernel depends on beside a call's arguments: knobs, hooks, captured globals
triton_kernel.py   a Triton kernel, autotuned or with heuristics: its parameters, and what Triton compiled as a row
host_code.py       functions, methods, modules and what else launches kernels: which ones they name
host_program.py    callable grids and heuristics as integer expressions
helion_record.py   what a Helion kernel's host function does, as data
adoption.py        adopt and unadopt, for one kernel or for all of the process
"""

from .adoption import adopt, adopting, explain, unadopt

__all__ = ["adopt", "adopting", "explain", "unadopt"]
