"""The example of a sequence, an eager decoder: its tokens, and its launches with the null driver."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import hdispatch
import pytest
import torch
from hdispatch import _C, Key

EXAMPLE = Path(__file__).parents[2] / "examples" / "eager_decoder.py"
PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("eager_decoder", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HIDDEN": 256, "INTERMEDIATE": 512, "HEADS": 4, "KV_HEADS": 2, "POSITIONS": 16}.items():
        monkeypatch.setattr(example, name, value)
    for each in hdispatch.registered():
        each.unregister()
    for bundle in hdispatch.loaded():
        bundle.unload()
    hdispatch.stats(reset=True)


def test_cached_steps_give_the_tokens_of_whole_prompts(example: ModuleType) -> None:
    """A token at a time, with caches, against a prompt of all tokens each time."""
    cpu = torch.device("cpu")
    tokens = example.generate(PROMPT, 6, cpu)
    assert len(set(tokens[len(PROMPT) :])) > 2
    for length in range(len(PROMPT), len(tokens)):
        assert example.generate(tokens[:length], 1, cpu) == tokens[: length + 1]


def test_its_ops_are_launched_by_one_call_a_step(example: ModuleType) -> None:
    """Rows that do nothing, for the ops that the example calls: one hit of the sequence is all of its launches."""
    variants = {"rms_norm": "bfloat16", "fused_add_rms_norm": "bfloat16", "silu_and_mul": "bfloat16"}
    variants["rotary_embedding"] = hdispatch.registry.spec("rotary_embedding").typical or ""
    made = []
    for op, prefix in variants.items():
        names = [name for name in hdispatch.registry.spec(op).variant_arguments() if name.startswith(prefix)]
        for name in names:
            made.append(hdispatch.register(op, Key(name), _Nothing(), args=[], stream="none", driver="null"))
    hdispatch.stats(reset=True)
    with hdispatch.strict():
        example.generate(PROMPT, 4, torch.device("cpu"), layers=3)
    stats = hdispatch.stats()
    assert stats["eager decoder"] == {"hits": 4, "empty": 0, "fallbacks": 0, "misses": {}}
    assert {op: stats[op]["hits"] for op in variants} == {
        "rms_norm": 4,
        "fused_add_rms_norm": 24,
        "silu_and_mul": 12,
        "rotary_embedding": 12,
    }
    for each in made:
        each.unregister()


class _Nothing:
    """A TVM-FFI function that does nothing, as `register` takes them."""

    def __chandle__(self) -> int:
        return _C.bench_function()
