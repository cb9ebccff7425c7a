"""The PTX of the kernels' silu, its sigmoid and the widening of bfloat16, for Triton and for Helion. No GPU code runs here."""

from __future__ import annotations

#: e = 1 + exp(-$1), float32. exp is nvcc's expf, constants included: Triton's exp multiplies by log2(e) in float32, and loses
#: a bit for every doubling of its argument.
_TOTAL = (
    ".reg .f32 e, n, t; "
    "fma.rn.sat.f32 t, $1, 0fBBBB989D, 0f3F000000; fma.rm.f32 t, t, 0f437C0000, 0f4B400001; "
    "sub.f32 n, 0f4B40007F, t; shl.b32 t, t, 23; "
    "fma.rn.f32 e, $1, 0fBFB8AA3B, n; fma.rn.f32 e, $1, 0fB2A57060, e; ex2.approx.ftz.f32 e, e; "
    "fma.rn.f32 e, t, e, 0f3F800000; "
)
#: 1 / e, exact by the last two instructions. It is subnormal where e exceeds 2**126, and rcp would make 0 of it: so rcp takes
#: e / 4, and its result, 4 / e, is divided by 4. .sat makes 0 of NaN, which an infinite e gives.
_RECIPROCAL = (
    "mul.rn.f32 t, e, 0f3E800000; rcp.approx.ftz.f32 t, t; mul.rn.f32 t, t, 0f3E800000; "
    "neg.f32 n, e; fma.rn.f32 n, n, t, 0f3F800000; fma.rn.sat.f32 $0, n, t, t; "
)

#: $0 = 1 / (1 + exp(-$1)), float32.
SIGMOID = f"{{{_TOTAL}{_RECIPROCAL}}}"

#: $0 = $1 / (1 + exp(-$1)), float32; of a $1 of 16 bits exact, once rounded to its dtype. t is 1 / e to some 21 bits: the
#: square of a reciprocal root, which is never subnormal itself. The remainder of the quotient does the rest; it has its sign
#: reversed: added as it is, it would make +0 of -0. It is NaN, and min drops it, where $1 is inf or e is; the quotient is right
#: then.
SILU = (
    f"{{{_TOTAL}.reg .f32 q, r; rsqrt.approx.ftz.f32 t, e; mul.rn.f32 t, t, t; mul.rn.f32 q, $1, t; "
    "neg.f32 r, $1; fma.rn.f32 r, q, e, r; min.f32 r, r, 0f7F7FFFFF; neg.f32 t, t; fma.rn.f32 $0, r, t, q;}"
)

#: bfloat16 to float32: two numbers of one register, in two instructions. Triton takes three, because it moves the upper one
#: down first.
WIDEN = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;"
