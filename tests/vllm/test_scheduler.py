"""Our plans of decode steps against vLLM's own: every plan, output and all state; what they take; the class put in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Schedule = Callable[..., dict[str, Any]]

SWAP = """
import simulation
simulation.start()
from hdispatch.integrations.vllm import scheduler
from vllm.config import SchedulerConfig
assert scheduler.STAND_IN.objection() == "", scheduler.STAND_IN.objection()
config = SchedulerConfig.default_factory(async_scheduling=True)
scheduler.STAND_IN.install(scheduler.DecodeScheduler)
assert config.get_scheduler_cls() is scheduler.DecodeScheduler
scheduler.STAND_IN.uninstall()
assert config.get_scheduler_cls() is scheduler.ORIGINAL
print("SWAPPED")
"""

ANOTHERS = """
import simulation
simulation.start()
from vllm.v1.core.sched import async_scheduler

class Theirs(async_scheduler.AsyncScheduler):
    def schedule(self, throttle_prefills=False):
        return super().schedule(throttle_prefills)

async_scheduler.AsyncScheduler = Theirs
from hdispatch.integrations.vllm import scheduler
scheduler.STAND_IN.install(scheduler.DecodeScheduler)
assert async_scheduler.AsyncScheduler is Theirs
print("LEFT", scheduler.STAND_IN.objection())
"""


@pytest.mark.parametrize(
    ("blocks", "caching", "seqs", "policy", "share"),
    [
        (2000, False, 64, "fcfs", 0.8),
        (60, False, 16, "fcfs", 0.05),
        (60, True, 16, "priority", 0.05),
        (1000, True, 4, "fcfs", 0.8),
    ],
    ids=["plain", "preempted", "cached", "full"],
)
def test_every_plan_is_vllms(schedule: Schedule, blocks: int, caching: bool, seqs: int, policy: str, share: float) -> None:
    """Requests come, end, are aborted and preempted at random."""
    sizes: dict[str, Any] = {"blocks": blocks, "caching": caching, "seqs": seqs, "policy": policy}
    found = schedule(what="compare", seed=blocks + seqs, steps=2500, **sizes)
    assert found["finished"] > 100
    assert found["ours"] > share * found["steps"]
    assert (found["preempted"] > 20) == (blocks < 100)


def test_a_plan_of_many_requests_takes_a_fraction_of_vllms(schedule: Schedule) -> None:
    found = schedule(what="measure", requests=128)
    assert found["ours"] < 0.4 * found["theirs"]


def test_the_class_is_put_in_and_taken_out(output: Callable[..., str]) -> None:
    assert "SWAPPED" in output("-c", SWAP)


def test_what_a_derived_scheduler_overrides_is_called(schedule: Schedule) -> None:
    found = schedule(what="derive")
    assert found["calls"] == [60] + [3] * 9
    assert found["reason"] == "the scheduler is Derived"


def test_anothers_scheduler_in_the_place_of_vllms_stays(output: Callable[..., str]) -> None:
    """Where another plug-in came first."""
    assert "LEFT there is no source of Theirs.schedule to compare" in output("-c", ANOTHERS)
