"""The PTX that widens bfloat16 to float32, for Triton and for Helion. No GPU code runs here."""

from __future__ import annotations

#: Two numbers of one register, in two instructions. Triton takes three, because it moves the upper one down first.
WIDEN = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;"
