"""The SGLang plug-in without SGLang: its switches, its functions, and what doctor says of it."""

from __future__ import annotations

import importlib.metadata
import sys

import hdispatch
import pytest
import torch
from hdispatch import HdispatchError, registry
from hdispatch.integrations import switch
from hdispatch.integrations.sglang import FUNCTIONS, plugin


def test_every_function_names_an_op_and_is_named_once():
    assert {function.op for function in FUNCTIONS} <= set(registry.names())
    assert len({function.target for function in FUNCTIONS}) == len(FUNCTIONS)
    assert [each.target.rpartition(".")[2] for each in FUNCTIONS if each.is_method] == ["forward_aot"]


def test_what_a_modules_imports_raise_is_raised(tmp_path, monkeypatch):
    (tmp_path / "holding").mkdir()
    (tmp_path / "holding" / "__init__.py").write_text("")
    (tmp_path / "holding" / "broken.py").write_text("from sys import nothing_like_it\n")
    (tmp_path / "holding" / "needing.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "holding" / "whole.py").write_text("class Kernel:\n    class Inner: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugin.find("holding.whole").__name__ == "holding.whole"
    assert plugin.find("holding.whole.Kernel.Inner").__qualname__ == "Kernel.Inner"
    for name, error, said in [
        ("holding.broken", ImportError, "nothing_like_it"),
        ("holding.broken.Kernel", ImportError, "nothing_like_it"),
        ("holding.needing", ModuleNotFoundError, "a_module_that_is_not_there"),
        ("holding.absent", AttributeError, "absent"),
        ("no_such_package.module", ModuleNotFoundError, "no_such_package"),
    ]:
        with pytest.raises(error, match=said):
            plugin.find(name)


def test_off_it_does_not_even_look_for_sglang(monkeypatch):
    monkeypatch.delenv("HDISPATCH", raising=False)
    monkeypatch.setitem(sys.modules, "sglang", None)  # any import of it raises
    plugin.register()
    assert plugin._SERVED == []


def test_a_wrong_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("HDISPATCH", "yes")
    with pytest.raises(HdispatchError, match=r"HDISPATCH is 'yes'; it takes 1 \(serve SGLang with hdispatch\) or 0"):
        plugin.register()


def test_the_ops_that_may_serve(monkeypatch):
    monkeypatch.delenv("HDISPATCH_SGLANG_OPS", raising=False)
    assert plugin.chosen() == list(FUNCTIONS)
    monkeypatch.setenv("HDISPATCH_SGLANG_OPS", " scaled_mm,")
    assert [each.op for each in plugin.chosen()] == ["scaled_mm"]
    monkeypatch.setenv("HDISPATCH_SGLANG_OPS", "scaled_mm,argmax")
    with pytest.raises(HdispatchError, match="no function of SGLang is served by argmax, but by rms_norm, "):
        plugin.chosen()


@pytest.fixture
def sglang_here(monkeypatch, tmp_path):
    """An SGLang 0.5.23 that is installed, on CUDA, with the switch on."""
    found = {"version": "0.5.23"}
    monkeypatch.setattr(plugin.importlib.metadata, "version", lambda _: found["version"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("HDISPATCH", "1")
    monkeypatch.setenv("HDISPATCH_BUNDLE", str(tmp_path))
    monkeypatch.delenv("SGLANG_PLUGINS", raising=False)
    monkeypatch.setitem(sys.modules, "sglang", None)
    return found


def test_doctor_says_why_sglang_would_not_be_served(monkeypatch, sglang_here):
    def reason():
        found = plugin.examine()
        assert not found["ok"]
        assert found["version"] == sglang_here["version"]
        return found["reason"]

    assert reason().startswith("SGLang cannot be imported: ModuleNotFoundError")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "torch sees no CUDA device; the plug-in is for CUDA"
    sglang_here["version"] = "0.5.24"
    assert reason() == "this is SGLang 0.5.24; the plug-in is for 0.5.23"
    monkeypatch.setenv("HDISPATCH_SGLANG_OPS", "nothing")
    assert "served by nothing" in reason()
    monkeypatch.setenv("HDISPATCH_BUNDLE", "/none")
    assert "which does not exist" in reason()
    monkeypatch.setenv("HDISPATCH", "0")
    assert reason() == "HDISPATCH is not 1: the plug-in does nothing"
    monkeypatch.setenv("SGLANG_PLUGINS", "another")
    assert reason() == "SGLANG_PLUGINS is 'another', which leaves hdispatch out"
    monkeypatch.setattr(plugin.importlib.metadata, "entry_points", lambda **_: [])
    assert "no entry point in sglang.srt.plugins" in reason()


def test_doctor_without_sglang(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(plugin.importlib.metadata, "version", missing)
    found = {"ok": False, "reason": "SGLang is not installed", "version": None, "ops": [], "left": {}}
    assert plugin.examine() == found


def test_a_sglang_that_does_not_fit_is_left_alone(sglang_here, caplog):
    sglang_here["version"] = "0.6.0"
    plugin.register()
    assert "hdispatch: off: this is SGLang 0.6.0; the plug-in is for 0.5.23" in caplog.text
    assert plugin._SERVED == []


def test_one_without_its_kernels_stays_its_own(monkeypatch, sglang_here, caplog):
    monkeypatch.setitem(sys.modules, "sgl_kernel", None)
    plugin.register()
    assert "hdispatch: sgl_kernel.rmsnorm stays SGLang's own: it cannot be imported" in caplog.text
    assert plugin._SERVED == []


def test_a_bundle_is_loaded_with_a_models_first_cuda_parameter(monkeypatch):
    loaded = []
    monkeypatch.setattr(switch, "load_bundle", lambda device, _: loaded.append(device))
    monkeypatch.setattr(plugin, "_LOADED", [])
    on_cuda = type("Parameter", (), {"is_cuda": True, "device": torch.device("cuda", 1)})()
    for parameter in (None, torch.nn.Parameter(torch.zeros(1)), on_cuda, on_cuda):
        plugin._on_parameter(torch.nn.Module(), "weight", parameter)  # type: ignore[arg-type]
    assert loaded == [torch.device("cuda", 1)]


def test_a_hook_hands_over_what_is_not_served():
    """Without a bundle: arguments and result are the original's."""
    hdispatch.stats(reset=True)
    function = next(each for each in FUNCTIONS if each.op == "silu_and_mul")
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    got = function.make_hook()(lambda *args, **named: (args, named), x, None, expert_step=1)
    assert got[0][0] is x
    assert got[1] == {"expert_step": 1}
    assert sum(hdispatch.stats()["silu_and_mul"]["misses"].values()) == 1
