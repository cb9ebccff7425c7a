"""The vLLM plug-in without vLLM: its switches, and what doctor says of it."""

from __future__ import annotations

import sys
from types import SimpleNamespace as Object

import pytest
import torch
from hdispatch import HdispatchError
from hdispatch.cli import doctor
from hdispatch.integrations.vllm import plugin, settings

# ---- switches ----


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch, value, on):
    monkeypatch.delenv("HDISPATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("HDISPATCH", value)
    assert settings.is_on() is on


def test_a_wrong_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("HDISPATCH", "yes")
    with pytest.raises(HdispatchError, match=r"HDISPATCH is 'yes'; it takes 1 .* or 0"):
        plugin.register()


def test_what_decode_steps_take(monkeypatch, tmp_path):
    monkeypatch.delenv("HDISPATCH_ATTENTION", raising=False)
    assert settings.attention() == "auto"
    for value in settings.ATTENTIONS:
        monkeypatch.setenv("HDISPATCH_ATTENTION", value)
        assert settings.attention() == value
    monkeypatch.setenv("HDISPATCH_ATTENTION", "fa2")
    with pytest.raises(HdispatchError, match="HDISPATCH_ATTENTION is 'fa2'; it takes auto, half, fa3"):
        settings.attention()


def test_off_it_does_not_even_look_for_vllm(monkeypatch):
    monkeypatch.setenv("HDISPATCH", "0")
    monkeypatch.setitem(sys.modules, "vllm", None)  # any import of it raises
    plugin.register()


@pytest.mark.parametrize(
    "name", ["HDISPATCH_ATTENTION", "HDISPATCH_REPLAY", "HDISPATCH_RUNNER", "HDISPATCH_SCHEDULER", "HDISPATCH_METRICS_PORT"]
)
def test_wrong_settings_are_told_before_a_model_is_made(monkeypatch, tmp_path, fake_vllm, name):
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    monkeypatch.setenv(name, "yes")
    with pytest.raises(HdispatchError, match=f"{name} is 'yes'; it takes"):
        plugin.register()
    assert f"{name} is 'yes'" in plugin.examine()["reason"]


@pytest.mark.parametrize(("value", "port"), [("", 0), ("0", 0), ("9100", 9100), ("65535", 65535)])
def test_the_port_of_metrics(monkeypatch, value, port):
    monkeypatch.setenv("HDISPATCH_METRICS_PORT", value)
    assert settings.metrics_port() == port


@pytest.mark.parametrize("value", ["65536", "-1", "9100.5", "²"])
def test_a_wrong_port_of_metrics(monkeypatch, value):
    monkeypatch.setenv("HDISPATCH_METRICS_PORT", value)
    with pytest.raises(HdispatchError, match="it takes a port, 1 to 65535"):
        settings.metrics_port()


def test_a_worker_serves_metrics_on_its_own_port(monkeypatch):
    prometheus_client = pytest.importorskip("prometheus_client")
    from hdispatch import metrics

    started = []
    monkeypatch.setattr(prometheus_client, "start_http_server", started.append)
    monkeypatch.setenv("HDISPATCH_METRICS_PORT", "9100")
    plugin.serve_metrics(3)
    try:
        assert started == [9103]
        assert prometheus_client.REGISTRY.get_sample_value("hdispatch_hits_total", {"op": "toy"}) is not None
    finally:
        prometheus_client.REGISTRY.unregister(metrics.register())


def test_a_bundle_must_be_named(monkeypatch, tmp_path):
    monkeypatch.setattr(plugin.embedded, "FOLDER", tmp_path / "bundles")
    monkeypatch.setattr(plugin, "_unfit", str)
    monkeypatch.setenv("HDISPATCH", "1")
    monkeypatch.delenv("HDISPATCH_BUNDLE", raising=False)
    with pytest.raises(HdispatchError, match="HDISPATCH_BUNDLE is not set, and this hdispatch was installed without a bundle"):
        plugin.register()
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path / "none"))
    with pytest.raises(HdispatchError, match="which does not exist; make it with `hdispatch build --out"):
        plugin.register()
    settings.load_bundle(torch.device("cpu"))  # the references serve CPU tensors: nothing to load


# ---- what doctor says ----


@pytest.fixture
def fake_vllm(monkeypatch):
    """A vLLM 0.33 on CUDA whose models are not there."""
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda _: "0.33.0")
    monkeypatch.setitem(sys.modules, "vllm", Object(__version__="0.33.0"))
    platform = Object(is_cuda=lambda: True, device_name="cuda")
    monkeypatch.setitem(sys.modules, "vllm.platforms", Object(current_platform=platform))
    monkeypatch.setitem(sys.modules, "vllm.distributed", None)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("HDISPATCH", "1")
    return platform


def test_doctor_says_why_vllm_would_not_be_served(monkeypatch, tmp_path, fake_vllm):
    def reason():
        found = plugin.examine()
        assert not found["ok"]
        assert found["version"] == "0.33.0"
        return found["reason"]

    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    assert reason().startswith("vLLM cannot be imported: ModuleNotFoundError")
    fake_vllm.is_cuda = lambda: False
    assert reason() == "vLLM runs on cuda; the plug-in is for CUDA"
    sys.modules["vllm"].__version__ = "0.34.1"
    assert reason() == "this is vLLM 0.34.1; the plug-in is for 0.33"
    monkeypatch.setenv("HDISPATCH_BUNDLE", "")
    monkeypatch.setattr(plugin.embedded, "FOLDER", tmp_path / "bundles")
    assert "HDISPATCH_BUNDLE is not set" in reason()
    monkeypatch.setenv("HDISPATCH", "0")
    assert reason() == "HDISPATCH is not 1: the plug-in does nothing"
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert reason() == "VLLM_PLUGINS is 'another', which leaves hdispatch out"
    monkeypatch.setattr(plugin.importlib.metadata, "entry_points", lambda **_: [])
    assert "no entry point in vllm.general_plugins" in reason()


@pytest.mark.parametrize(
    ("capability", "layers"), [((9, 0), ""), ((10, 0), "has compute capability 10.0; FlashAttention 3"), (None, "")]
)
def test_doctor_looks_at_the_gpu_for_the_layers(monkeypatch, tmp_path, fake_vllm, capability, layers):
    """Elsewhere than on Hopper every model is refused when it is made."""
    part = Object(ARCHITECTURES={"Qwen3ForCausalLM": None}, objection=str)
    monkeypatch.setattr(plugin, "PARTS", {name: lambda: part for name in plugin.PARTS})
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA B200")
    found = plugin.examine()
    assert found["ok"], found["reason"]
    assert layers in found["layers"]
    assert found["models"] == ([] if layers else ["Qwen3ForCausalLM"])
    assert ("vLLM's own layers: NVIDIA B200" in doctor._words_of_vllm(found)) == bool(layers)


def test_doctor_without_vllm(monkeypatch):
    def missing(name):
        raise plugin.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plugin.importlib.metadata, "version", missing)
    found = {
        "ok": False,
        "reason": "vLLM is not installed",
        "version": None,
        "models": [],
        "decode": "",
        "layers": "",
        "runner": "",
        "scheduler": "",
    }
    assert plugin.examine() == found


@pytest.mark.parametrize(("version", "cuda"), [("0.34.0", True), ("0.33.0", False)])
def test_a_vllm_that_does_not_fit_is_left_alone(monkeypatch, caplog, fake_vllm, version, cuda):
    sys.modules["vllm"].__version__ = version
    fake_vllm.is_cuda = lambda: cuda
    plugin.register()
    assert "hdispatch: off: " in caplog.text
    assert not plugin._OVERRIDE
