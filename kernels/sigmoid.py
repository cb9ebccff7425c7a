"""The PTX of the sigmoid in the kernels' silu, for Triton and for Helion. No GPU code runs here."""

from __future__ import annotations

#: $0 = 1 / (1 + exp(-$1)), float32. exp is nvcc's expf, constants included: Triton's exp multiplies by log2(e) in float32, and
#: loses a bit for every doubling of its argument. The sum is kept finite, so that two more instructions make its reciprocal
#: exact; above 2**126 that is 0 instead of a subnormal number.
SIGMOID = (
    "{.reg .f32 e, n, t; "
    "fma.rn.sat.f32 t, $1, 0fBBBB989D, 0f3F000000; fma.rm.f32 t, t, 0f437C0000, 0f4B400001; "
    "sub.f32 n, 0f4B40007F, t; shl.b32 t, t, 23; "
    "fma.rn.f32 e, $1, 0fBFB8AA3B, n; fma.rn.f32 e, $1, 0fB2A57060, e; ex2.approx.ftz.f32 e, e; "
    "fma.rn.f32 e, t, e, 0f3F800000; min.f32 e, e, 0f7F7FFFFF; "
    "rcp.approx.ftz.f32 t, e; neg.f32 e, e; fma.rn.f32 e, e, t, 0f3F800000; fma.rn.f32 $0, e, t, t;}"
)
