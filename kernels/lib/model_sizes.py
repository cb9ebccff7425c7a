"""The sizes that a model calls ops with, by label: what declarations take for `calls`, and for the rows they list. No DSL."""

from __future__ import annotations

from collections.abc import Callable

from hdispatch.models import Model, named
from hdispatch.opspec import Sizes

#: What a model calls an op with: label -> sizes of a row. Where two labels have the same sizes, the first one names them.
Calls = Callable[[Model], dict[str, Sizes]]

#: The models whose sizes have rows of their own in every build.
LISTED = named("Qwen3-1.7B", "Qwen3-8B", "Qwen3-32B")
QWEN3_8B = named("Qwen3-8B")


def rows(calls: Calls, *labels: str, models: tuple[Model, ...] = LISTED) -> tuple[Sizes, ...]:
    """The sizes that models call an op with, each once: those of some labels, or of all."""
    found = [sizes for model in models for label, sizes in calls(model).items() if not labels or label in labels]
    return tuple(sizes for at, sizes in enumerate(found) if sizes not in found[:at])


def hidden(model: Model) -> dict[str, Sizes]:
    """Rows of the hidden size."""
    return {"hidden": {"K": model.hidden}}


def norms(model: Model) -> dict[str, Sizes]:
    """Rows that are normalized: of the hidden size, and where q and k are too, of their heads."""
    return {"hidden": {"K": model.hidden, "N": 1}} | ({"heads": {"K": model.head_dim}} if model.qk_norm else {})


def quantized(model: Model) -> dict[str, Sizes]:
    """Inputs of products: rows of the hidden size, of all q heads, and as wide as an MLP."""
    each = {"hidden": model.hidden, "out": model.q, **_labelled("intermediate", model.intermediate)}
    return {label: {"K": size} for label, size in each.items()}


def activated(model: Model) -> dict[str, Sizes]:
    """Rows as wide as an MLP, behind its activation."""
    return {label: {"N": size} for label, size in _labelled("intermediate", model.intermediate).items()}


def products(model: Model) -> dict[str, Sizes]:
    """The products of a layer; of a mixture of experts those that are no expert's."""
    found = {"qkv": {"K": model.hidden, "N": model.q + 2 * model.kv}, "out": {"K": model.q, "N": model.hidden}}
    for label, size in _labelled("gate_up", model.dense).items():
        found[label] = {"K": model.hidden, "N": 2 * size}
        found[label.replace("gate_up", "down")] = {"K": size, "N": model.hidden}
    return found


def router(model: Model) -> dict[str, Sizes]:
    """The product that chooses experts."""
    return {"router": {"K": model.hidden, "N": model.experts}} if model.experts else {}


def lm_head(model: Model) -> dict[str, Sizes]:
    """The product that makes logits."""
    return {"lm_head": {"K": model.hidden, "N": model.vocabulary}} if model.vocabulary else {}


def few_rows(model: Model) -> dict[str, Sizes]:
    """The products in 16 bits of a decode step: the one that chooses experts, and the one that makes logits."""
    return router(model) | lm_head(model)


def qkv(model: Model) -> dict[str, Sizes]:
    """Rows of all heads of q, k and v, where q and k are normalized."""
    return {"qkv": {"K": model.q + 2 * model.kv}} if model.qk_norm else {}


def rotary(model: Model) -> dict[str, Sizes]:
    """Rows of all heads of q, and of k."""
    return {"q": {"K": model.q, "N": model.kv}}


def head(model: Model) -> dict[str, Sizes]:
    """One head."""
    return {"head": {"K": model.head_dim}}


def experts(model: Model) -> dict[str, Sizes]:
    """A number for each expert."""
    return {"experts": {"N": model.experts}} if model.experts else {}


def experts_of_any_number(model: Model) -> dict[str, Sizes]:
    """Experts, whose number no row names."""
    return {"experts": {}} if model.experts else {}


def summed(model: Model) -> dict[str, Sizes]:
    """Results of experts: rows of the hidden size."""
    return {"hidden": {"N": model.hidden}} if model.experts else {}


def _labelled(label: str, sizes: tuple[int, ...]) -> dict[str, int]:
    """A label for each size: the label itself, with the size from the second one on."""
    return {label if not at else f"{label} {size}": size for at, size in enumerate(sizes)}
