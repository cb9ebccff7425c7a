"""The plug-in on SGLang's own Python, without a GPU: SGLang loads it, and its layers and functions are called."""

from __future__ import annotations

from hdispatch.integrations.sglang import FUNCTIONS

OPS = {function.op for function in FUNCTIONS}


def test_its_layers_and_functions_are_served(ask):
    found = ask("served")
    calls = found["calls"]
    assert {name.partition(" ")[0] for name in calls} == OPS
    for name, call in calls.items():
        assert call == {"hits": {name.partition(" ")[0]: 1}, "reasons": [], "own": []}, (name, found["log"][-3000:])
    assert "rows of rms_norm, fused_add_rms_norm, silu_and_mul" in found["log"]
    for name, call in found["empty"].items():  # nothing is to be done for no rows
        assert (call["reasons"], call["own"]) == ([], []), name


def test_numbers_are_those_of_sglangs_references(ask):
    assert ask("numbers")["ok"]


def test_what_is_unusual_goes_to_sglangs_own_kernels(ask):
    found = ask("unusual")
    log = found.pop("log")
    own = {
        "norm of float32": ["rmsnorm"],
        "norm with a float32 weight": ["fused_add_rmsnorm"],
        "norm that needs a gradient": ["rmsnorm"],
        "experts": ["run_activation"],
        "activation under torch.compile": ["run_activation"],
        "activation of float32": ["run_activation"],
        "rope and store": ["apply_rope_inplace_with_kvcache"],
        "rope of int32 positions": ["apply_rope_inplace"],
        "rope of part of a head": ["apply_rope_inplace"],
        "tokens of float32": ["per_token_quant_fp8"],
        "tokens into a longer buffer": ["per_token_quant_fp8"],
        "groups to int8": ["per_token_group_quant"],
        "groups of 32": ["per_token_group_quant"],
        "groups without buffers": ["per_token_group_quant"],
        "packed groups": ["per_token_group_quant"],
        "groups with an activation": ["per_token_group_quant"],
        "product to float32": ["fp8_scaled_mm"],
        "product of rows": ["fp8_scaled_mm"],
    }
    assert {name: call["own"] for name, call in found.items()} == own, log[-3000:]
    assert not [name for name, call in found.items() if call["hits"]]
    counted = {name: call["reasons"] for name, call in found.items() if call["reasons"]}
    assert counted["norm of float32"] == ["override: result: dtype"]
    assert counted["norm with a float32 weight"] == ["override: weight: dtype"]
    assert counted["norm that needs a gradient"] == ["override: an argument requires grad"]
    assert counted["rope of int32 positions"] == ["override: positions: dtype"]
    assert counted["groups of 32"] == ["no variant: group_size"]
    # What an op does not do at all is not tried, and not counted.
    assert not {"experts", "activation under torch.compile", "rope and store", "packed groups"} & set(counted)


def test_off_nothing_is_touched(ask):
    found = ask("off", HDISPATCH="0")
    assert (found["hooks"], found["plugins"]) == ([], [])
    for name, call in found["calls"].items():
        assert not call["hits"], name
        assert call["own"], name


def test_left_out_by_sglangs_own_variable(ask):
    found = ask("hooks", SGLANG_PLUGINS="another")
    assert (found["hooks"], found["plugins"]) == ([], [])


def test_a_wrong_switch_is_in_its_log_and_it_serves_itself(ask):
    found = ask("hooks", HDISPATCH="yes")
    assert "HDISPATCH is 'yes'; it takes 1 (serve SGLang with hdispatch) or 0 (do not)" in found["log"]
    assert found["hooks"] == []


def test_some_ops_alone(ask):
    found = ask("hooks", HDISPATCH_SGLANG_OPS="silu_and_mul, rms_norm")
    assert found["hooks"] == ["sgl_kernel.rmsnorm", "sglang.kernels.ops.activation.activation.silu_and_mul"]
    assert found["plugins"] == ["activation.silu_and_mul"]
    found = ask("hooks", HDISPATCH_SGLANG_OPS="silu")
    assert "HDISPATCH_SGLANG_OPS is 'silu'; no function of SGLang is served by silu, but by rms_norm, " in found["log"]
    assert found["hooks"] == []


def test_its_kernel_registry_has_ours(ask):
    found = ask("registered")
    assert found["ops"] == found["known"] == sorted(function.kernel for function in FUNCTIONS if function.kernel)
    assert (found["hits"], found["shape"]) == (1, [5, 768])
    assert "silu_and_mul does not do what this call of sglang.kernels.ops" in found["refused"]


def test_a_function_with_other_parameters_stays_its_own(ask):
    found = ask("other_parameters")
    assert found["calls"]["rms_norm"] == {"hits": {}, "reasons": [], "own": ["rmsnorm"]}
    assert found["calls"]["fused_add_rms_norm"]["hits"] == {"fused_add_rms_norm": 1}
    assert "sgl_kernel.rmsnorm stays SGLang's own: its parameters are (input, weight, eps=1e-06" in found["log"]
    left = found["doctor"]["left"]
    assert set(left) == {"sgl_kernel.rmsnorm", next(each.target for each in FUNCTIONS if "v2" in each.target)}
    assert "more=0" in left["sgl_kernel.rmsnorm"]
    assert "rms_norm" not in found["doctor"]["ops"]


def test_doctor_says_what_is_served(ask):
    found = ask("examined")
    assert (found["ok"], found["reason"], found["version"], found["left"]) == (True, "", "0.5.23", {}), found["log"]
    assert set(found["ops"]) == OPS
    assert ask("examined", SGLANG_PLUGINS="x")["reason"] == "SGLANG_PLUGINS is 'x', which leaves hdispatch out"
