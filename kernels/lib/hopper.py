"""What an H100 and an H200 have, for configs and their candidates. No DSL."""

from __future__ import annotations

#: Streaming multiprocessors.
SMS = 132

#: Bytes of shared memory that a block can have, by how many blocks an SM is to hold at once.
SHARED_BYTES = {1: 232448, 2: 115712}
