"""Counts of calls and facts about bundles for Prometheus: `hdispatch.metrics.register()` adds them to its registry.

Whatever exposes that registry serves it: `prometheus_client.start_http_server`, a web framework's /metrics. Reading takes
the counters that `hdispatch.stats` reads, so a call costs nothing. They are this process's: register where bundles are
loaded. prometheus_client's multiprocess mode serves files of its own metrics alone, no collector of any process.

    hdispatch_hits_total{op}              calls that were launched
    hdispatch_empty_total{op}             calls of no rows
    hdispatch_misses_total{op, reason}    calls that no row of the table served
    hdispatch_fallbacks_total{op}         misses that an op's reference served
    hdispatch_rows{op, device}            rows of the bundle that serves a device
    hdispatch_bundle_info{device, sha256, target, arch, version}    1 for the bundle that serves a device
    hdispatch_bundle_load_seconds{device} how long it took to verify and load

op may be the name of a `Sequence`. device is "cuda:0", or "null" for the null driver. Calls are counted by op, not by device:
a process of a serving engine has one.
"""

from __future__ import annotations

from collections.abc import Iterator

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(f"hdispatch.metrics needs prometheus_client ({error}); pip install 'hdispatch[metrics]'") from error

from . import runtime


class RuntimeCollector(Collector):
    """Reads the counters of this process and the bundles that serve it, whenever it is asked."""

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        yield from _calls()
        yield from _bundles()


_COLLECTOR = RuntimeCollector()


def register(registry: CollectorRegistry = REGISTRY) -> RuntimeCollector:
    """Add the metrics to a registry, default the one that is served by default; nothing happens the second time."""
    if _COLLECTOR not in registry._collector_to_names:
        registry.register(_COLLECTOR)
    return _COLLECTOR


def _calls() -> Iterator[Metric]:
    hits = CounterMetricFamily("hdispatch_hits", "Calls that were launched from the table.", labels=["op"])
    empty = CounterMetricFamily("hdispatch_empty", "Calls of no rows.", labels=["op"])
    misses = CounterMetricFamily("hdispatch_misses", "Calls that no row served.", labels=["op", "reason"])
    fallbacks = CounterMetricFamily("hdispatch_fallbacks", "Misses that the op's reference served.", labels=["op"])
    for op, counted in runtime.stats().items():
        hits.add_metric([op], counted["hits"])
        empty.add_metric([op], counted["empty"])
        fallbacks.add_metric([op], counted["fallbacks"])
        for reason, count in counted["misses"].items():
            misses.add_metric([op, reason], count)
    yield from (hits, empty, misses, fallbacks)


def _bundles() -> Iterator[Metric]:
    rows = GaugeMetricFamily("hdispatch_rows", "Rows of the bundle that serves a device.", labels=["op", "device"])
    info = InfoMetricFamily("hdispatch_bundle", "The bundle that serves a device.", labels=["device"])
    seconds = GaugeMetricFamily("hdispatch_bundle_load_seconds", "Time to verify and load a bundle.", labels=["device"])
    for bundle in runtime.loaded():
        device = "null" if bundle.device < 0 else f"cuda:{bundle.device}"
        counted: dict[str, int] = {}
        for row in bundle.manifest["rows"]:
            counted[row["op"]] = counted.get(row["op"], 0) + 1
        for op, count in counted.items():
            rows.add_metric([op, device], count)
        target = bundle.manifest["target"]
        identity = {"sha256": bundle.sha256, "target": target["name"], "arch": target["arch"]}
        info.add_metric([device], identity | {"version": bundle.manifest["hdispatch"]})
        seconds.add_metric([device], bundle.load_seconds)
    yield from (rows, info, seconds)
