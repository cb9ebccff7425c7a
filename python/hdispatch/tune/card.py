"""The GPU that a timing is of: what decides whether two timings can be compared. Some of it may be unknown."""

from __future__ import annotations

import subprocess
from typing import NotRequired, TypedDict

import torch

#: What nvidia-smi is asked for, in this order.
_ASKED = ("clocks.max.sm", "clocks.max.memory", "power.limit")
_ASKED_SECONDS = 30.0


class Card(TypedDict):
    """A kind of GPU as it is set up; two timings are compared only where all of it is equal.

    sms, memory_mib     multiprocessors and memory, of a MIG instance its own
    sm_mhz, memory_mhz  the highest clocks that it may have
    power_w             the limit of its power, to a watt
    """

    name: str
    sms: NotRequired[int]
    memory_mib: NotRequired[int]
    sm_mhz: NotRequired[int]
    memory_mhz: NotRequired[int]
    power_w: NotRequired[int]


def read_card(index: int) -> Card:
    """The card of a CUDA device of this process; without clocks where nvidia-smi does not tell them."""
    found = torch.cuda.get_device_properties(index)
    card: Card = {
        "name": found.name,
        "sms": found.multi_processor_count,
        "memory_mib": found.total_memory // 2**20,
    }
    told = _numbers(f"GPU-{found.uuid}")
    if told is not None:
        card["sm_mhz"], card["memory_mhz"], card["power_w"] = told
    return card


def _numbers(uuid: str) -> tuple[int, int, int] | None:
    command = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASKED_SECONDS, check=False)
        sm, memory, power = (round(float(part)) for part in done.stdout.split(","))
    except (OSError, ValueError, subprocess.TimeoutExpired):  # no such tool, or [N/A]
        return None
    return sm, memory, power


def alike(one: Card, other: Card) -> bool:
    """Whether timings of the two can be compared: equal, as far as both say."""
    return all(one.get(name) == other[name] for name in one.keys() & other.keys())  # type: ignore[literal-required]


def words(card: Card) -> str:
    """For a person: `NVIDIA H100 80GB HBM3, 132 SMs, 81090 MiB, 1980 and 2619 MHz, 700 W`."""
    parts = [card["name"]]
    parts += [f"{card['sms']} SMs"] if "sms" in card else []
    parts += [f"{card['memory_mib']} MiB"] if "memory_mib" in card else []
    parts += [f"{card['sm_mhz']} and {card['memory_mhz']} MHz"] if "sm_mhz" in card and "memory_mhz" in card else []
    parts += [f"{card['power_w']} W"] if "power_w" in card else []
    return ", ".join(parts)
