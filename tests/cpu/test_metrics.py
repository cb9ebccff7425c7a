"""hdispatch.metrics: what a real HTTP scrape of the registry says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import hdispatch
import pytest
import toy
from hdispatch.manifest import MANIFEST_NAME

prometheus_client = pytest.importorskip("prometheus_client")
from hdispatch import metrics  # noqa: E402
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402


@pytest.fixture
def scrape() -> Iterator[object]:
    """A function: name of a sample -> {labels: value}, fetched from a server of a registry of its own."""
    registry = prometheus_client.CollectorRegistry()
    metrics.register(registry)
    metrics.register(registry)  # nothing happens
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)

    def fetch(name: str) -> dict[tuple[tuple[str, str], ...], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        return {
            tuple(sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    yield fetch
    server.shutdown()
    server.server_close()
    thread.join()


def test_calls(scrape, bundle):
    op = (("op", "toy"),)
    assert scrape("hdispatch_hits_total")[op] == 0
    for _ in range(3):
        hdispatch.ops.toy(*toy.arguments(4, 64))
    hdispatch.ops.toy(*toy.arguments(0, 64))
    hdispatch.ops.toy(*toy.arguments(4, 96))  # no row has this K
    assert scrape("hdispatch_hits_total")[op] == 3
    assert scrape("hdispatch_empty_total")[op] == 1
    assert scrape("hdispatch_fallbacks_total")[op] == 1
    assert scrape("hdispatch_misses_total") == {(("op", "toy"), ("reason", "no row")): 1}
    with hdispatch.strict(), pytest.raises(hdispatch.MissError):
        hdispatch.ops.toy(*toy.arguments(4, 96))
    assert scrape("hdispatch_misses_total") == {(("op", "toy"), ("reason", "no row")): 2}
    assert scrape("hdispatch_fallbacks_total")[op] == 1


def test_every_op_is_there(scrape, bundle):
    assert {dict(labels)["op"] for labels in scrape("hdispatch_hits_total")} >= set(hdispatch.registry.names())


def test_bundles(scrape, bundle):
    rows = scrape("hdispatch_rows")
    assert rows == {(("device", "null"), ("op", "toy")): bundle.rows}
    (labels,) = scrape("hdispatch_bundle_info")
    target = bundle.manifest["target"]
    assert dict(labels) == {
        "device": "null",
        "sha256": hashlib.sha256((bundle.folder / MANIFEST_NAME).read_bytes()).hexdigest(),
        "target": target["name"],
        "arch": target["arch"],
        "version": bundle.manifest["hdispatch"],
    }
    (seconds,) = scrape("hdispatch_bundle_load_seconds").values()
    assert 0 < seconds < 60
    bundle.unload()
    assert not scrape("hdispatch_rows")
    assert not scrape("hdispatch_bundle_info")


def test_without_prometheus_client():
    code = """
import sys
sys.modules["prometheus_client"] = None
import hdispatch
try:
    import hdispatch.metrics
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("hdispatch.metrics needs prometheus_client"), done.stderr
    assert done.stdout.rstrip().endswith("pip install 'hdispatch[metrics]'")


def test_the_default_registry(bundle):
    assert metrics.register() is metrics.register()
    try:
        assert prometheus_client.REGISTRY.get_sample_value("hdispatch_hits_total", {"op": "toy"}) == 0
    finally:
        prometheus_client.REGISTRY.unregister(metrics.register())
