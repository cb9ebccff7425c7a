"""The ops under torch.compile, export, jit and fx."""

from __future__ import annotations

import inspect

import hdispatch
import pytest
import torch
import toy
from doors import (
    INPUT,
    RESIDUAL,
    RESULT,
    SCALE,
    WEIGHT,
    bf16,
    counted,
    counts,
    replaced,
)

pytestmark = [
    pytest.mark.usefixtures("bundle"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's own
]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("door", ["ops", "torch.ops"])
def test_compile(backend, dynamic, door):
    def layer(result, x, weight, scale, residual):
        x = x * 2
        if door == "ops":
            hdispatch.ops.toy(result, x, weight, scale, 0.5, residual=residual)
        else:
            torch.ops.hdispatch.toy(result, x, weight, scale, 0.5, None, residual)
        return result.float() + scale, x if residual is None else residual * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)
    # K = 96 has no row, so the fallback writes what can be compared; K = 64 is launched by a driver that does nothing.
    for m in (4, 7, 16):
        a, b = (toy.arguments(m, 96, "bfloat16+residual") for _ in range(2))
        actual = compiled(a[RESULT], a[INPUT], a[WEIGHT], a[SCALE], a[RESIDUAL])
        expected = layer(b[RESULT], b[INPUT], b[WEIGHT], b[SCALE], b[RESIDUAL])
        for left, right in zip((*actual, *a), (*expected, *b), strict=True):
            if isinstance(left, torch.Tensor):
                assert torch.equal(left.float(), right.float())
    assert counts() == counted(**{"no row": 6})
    with torch.no_grad():
        a = toy.arguments(4, 64)
        compiled(a[RESULT], a[INPUT], a[WEIGHT], a[SCALE], None)
    assert counts()["hits"] == 1


def test_signature():
    signature = inspect.signature(hdispatch.ops.toy)
    assert str(signature) == (
        "(result: torch.Tensor, input: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, epsilon: float, "
        "scale_ub: torch.Tensor | None = None, residual: torch.Tensor | None = None) -> None"
    )


def test_signatures_of_all_ops():
    for name in hdispatch.registry.names():
        spec, parameters = hdispatch.registry.spec(name), inspect.signature(hdispatch.registry.get(name)).parameters
        assert list(parameters) == [arg.name for arg in spec.args]


def test_compile_refuses_a_wrong_call():
    def call(result, x, weight, scale):
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)

    torch._dynamo.reset()
    a = replaced(WEIGHT, bf16(65))
    with pytest.raises(Exception, match=r"weight has size\(0\) = 65"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(*a[:4])
    assert counts() == counted()


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, result, x, weight, scale):
            torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
            return result

    a = toy.arguments()
    program = torch.export.export(Layer(), tuple(a[:4]))
    assert "hdispatch.toy" in program.graph_module.code
    program.module()(*a[:4])
    assert counts() == counted(hits=1)


def test_jit_trace():
    def call(result, x, weight, scale):
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
        return result

    a = toy.arguments()
    traced = torch.jit.trace(call, tuple(a[:4]), check_trace=False)
    assert "hdispatch::toy" in str(traced.graph)


def test_fx():
    def call(result, x, weight, scale):
        hdispatch.ops.toy(result, x, weight, scale, 0.5)
        torch.ops.hdispatch.toy(result, x, weight, scale, 0.5)
        return result

    traced = torch.fx.symbolic_trace(call)
    packet = torch.ops.hdispatch.toy
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [packet, packet]
    traced(*toy.arguments()[:4])
    assert counts() == counted(hits=2)


def test_the_packet_is_still_torchs():
    packet = torch.ops.hdispatch.toy
    assert isinstance(packet, torch._ops.OpOverloadPacket)
    assert packet is torch.ops.hdispatch.toy
    assert packet.overloads() == ["default"]
    assert packet.default is packet.default
    assert packet.default.overloadpacket is packet
