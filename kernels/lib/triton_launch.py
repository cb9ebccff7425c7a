"""The launch options that the host functions of Triton kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def launch_options(config: Mapping[str, Any], num_stages: int | None = 1) -> dict[str, Any]:
    """PDL, as the kernel's constant and as the option, unless the config has `"pdl": False`; num_warps; num_stages.

    num_stages  of loops that say nothing themselves; None: Triton's default
    """
    pdl = config.get("pdl", True)
    stages = {} if num_stages is None else {"num_stages": num_stages}
    return {"PDL": pdl, "num_warps": config["num_warps"], **stages, "launch_pdl": pdl}
