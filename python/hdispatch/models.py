"""Models: their sizes, by name or from a config.json, and the calls of ops that they make.

For tuning and building what one model needs; an op's declaration says what a model calls it with (`OpSpec.calls`).

Of a mixture of experts the attention, the router, the dense layers and the rows of an expert count; its grouped products are
no op here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import HdispatchError

if TYPE_CHECKING:
    from .opspec import OpSpec, Sizes, Variant

#: What a config.json is called in a model's folder.
CONFIG = "config.json"


@dataclass(frozen=True)
class Model:
    """A decoder: sizes in elements, heads of `head_dim`.

    intermediate  of each MLP: dense ones, an expert's, a shared expert's
    dense         those that are no expert's: their products are plain ones
    experts       0: none
    qk_norm       whether the heads of q and k are normalized
    vocabulary    rows of lm_head, a logit of each; 0: not known
    """

    name: str
    hidden: int
    intermediate: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int = 128
    dense: tuple[int, ...] = ()
    experts: int = 0
    qk_norm: bool = True
    vocabulary: int = 0

    @property
    def q(self) -> int:
        """Width of the q heads of a token."""
        return self.heads * self.head_dim

    @property
    def kv(self) -> int:
        """Width of the k heads of a token, and of the v heads."""
        return self.kv_heads * self.head_dim

    def shard(self, count: int) -> Model:
        """What one of `count` GPUs has of it under tensor parallelism. `HdispatchError` if it cannot be cut so."""
        cut = {"heads": self.heads, **{f"intermediate size {size}": size for size in self.intermediate}}
        if wrong := next((name for name, size in cut.items() if count < 1 or size % count), None):
            raise HdispatchError(f"{self.name}: {cut[wrong]} ({wrong}) cannot be cut into {count}")
        if self.kv_heads % count and count % self.kv_heads:
            raise HdispatchError(f"{self.name}: {self.kv_heads} kv heads cannot be cut into, or repeated for, {count}")
        return replace(
            self,
            heads=self.heads // count,
            kv_heads=max(1, self.kv_heads // count),
            intermediate=tuple(size // count for size in self.intermediate),
            dense=tuple(size // count for size in self.dense),
            vocabulary=-(-self.vocabulary // count),  # rows that are missing are padded
        )


def _dense(name: str, hidden: int, intermediate: int, heads: int, kv_heads: int, **more: Any) -> Model:
    return Model(name, hidden, (intermediate,), heads, kv_heads, dense=(intermediate,), **more)


MODELS = (
    _dense("Qwen3-0.6B", 1024, 3072, 16, 8, vocabulary=151936),
    _dense("Qwen3-1.7B", 2048, 6144, 16, 8, vocabulary=151936),
    _dense("Qwen3-4B", 2560, 9728, 32, 8, vocabulary=151936),
    _dense("Qwen3-8B", 4096, 12288, 32, 8, vocabulary=151936),
    _dense("Qwen3-14B", 5120, 17408, 40, 8, vocabulary=151936),
    _dense("Qwen3-32B", 5120, 25600, 64, 8, vocabulary=151936),
    Model("Qwen3-30B-A3B", 2048, (768,), 32, 4, experts=128, vocabulary=151936),
    Model("Qwen3-235B-A22B", 4096, (1536,), 64, 4, experts=128, vocabulary=151936),
    _dense("Llama-3.2-1B", 2048, 8192, 32, 8, head_dim=64, qk_norm=False, vocabulary=128256),
    _dense("Llama-3.2-3B", 3072, 8192, 24, 8, qk_norm=False, vocabulary=128256),
    _dense("Llama-3.1-8B", 4096, 14336, 32, 8, qk_norm=False, vocabulary=128256),
    _dense("Llama-3.3-70B", 8192, 28672, 64, 8, qk_norm=False, vocabulary=128256),
    Model("Mixtral-8x7B", 4096, (14336,), 32, 8, experts=8, qk_norm=False, vocabulary=32000),
)
#: What a config.json has whose heads are compressed (MLA), as DeepSeek-V3's: its sizes of q, k and v are not heads * head_dim.
COMPRESSED = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")
#: Model types of config.json that normalize q and k.
QK_NORM = ("qwen3", "qwen3_moe")


# ---- which models ----


def named(*names: str) -> tuple[Model, ...]:
    """Models of `MODELS` by name."""
    by_name = {model.name: model for model in MODELS}
    return tuple(by_name[name] for name in names)


def find(words: Iterable[str], shards: int = 1) -> list[Model]:
    """Models by name, as `Qwen3-8B`, by a model's folder, or by its config.json; each as one of `shards` GPUs has it.

    `HdispatchError` for what is none of these, or cannot be cut so.
    """
    return [_one(word).shard(shards) for word in words]


def _one(word: str) -> Model:
    by_name = {model.name.lower(): model for model in MODELS}
    # A name may come with its owner, as on a model hub.
    if found := by_name.get(word.lower()) or by_name.get(word.rpartition("/")[2].lower()):
        return found
    path = Path(word) / CONFIG if Path(word).is_dir() else Path(word)
    if not path.is_file():
        names = ", ".join(model.name for model in MODELS)
        raise HdispatchError(f"{word!r} is no model: it takes a config.json, a folder with one, or one of {names}")
    return read(path)


def read(path: Path) -> Model:
    """The model of a config.json, as transformers writes them.

    `HdispatchError` if a size is missing or none, if sizes do not fit each other, or for heads that are compressed, or of v
    that are of another size.
    """
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise HdispatchError(f"cannot read the model in {path}: {error}") from error
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):  # of a model that sees, too
        config = config["text_config"]
    if not isinstance(config, dict):
        raise HdispatchError(f"{path} holds a JSON {type(config).__name__}; it takes a model's config, an object")
    if compressed := next((name for name in COMPRESSED if config.get(name)), None):
        raise HdispatchError(
            f"{path}: {compressed} is {config[compressed]!r}: its heads are compressed (MLA), which no op here serves; it "
            f"takes a model of plain heads, with none of {', '.join(COMPRESSED)}"
        )
    hidden, heads = (_size(path, config, name) for name in ("hidden_size", "num_attention_heads"))
    kv_heads = _first(path, config, ("num_key_value_heads",)) or heads
    if heads % kv_heads:
        raise HdispatchError(
            f"{path}: num_attention_heads is {heads}; it takes a multiple of num_key_value_heads, which is {kv_heads}"
        )
    head_dim = _first(path, config, ("head_dim",))
    if not head_dim and hidden % heads:
        raise HdispatchError(
            f"{path}: hidden_size is {hidden}; without head_dim it takes a multiple of num_attention_heads, which is {heads}"
        )
    head_dim = head_dim or hidden // heads
    v_head_dim = _size(path, config, "v_head_dim") if config.get("v_head_dim") else head_dim
    if v_head_dim != head_dim:
        raise HdispatchError(
            f"{path}: v_head_dim is {v_head_dim}: v has heads of another size than q and k, which no op here serves; it takes "
            f"that of q and k, {head_dim}"
        )
    experts = _first(path, config, ("num_experts", "num_local_experts", "n_routed_experts"))
    expert = _first(path, config, ("moe_intermediate_size",)) if experts else 0
    shared = _first(path, config, ("shared_expert_intermediate_size",)) if experts else 0
    intermediate = _size(path, config, "intermediate_size") if not experts or not expert or _mixed(config) else 0
    dense = [intermediate] if intermediate and (not experts or _mixed(config)) else []
    dense += [shared] if shared else []
    each = [*dense, expert or intermediate] if experts else dense
    return Model(
        name=path.parent.name if path.name == CONFIG and path.parent.name else path.stem,
        hidden=hidden,
        intermediate=tuple(dict.fromkeys(each)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dense=tuple(dict.fromkeys(dense)),
        experts=experts,
        qk_norm=config.get("model_type") in QK_NORM,
        vocabulary=_first(path, config, ("vocab_size",)),
    )


def _mixed(config: dict[str, Any]) -> bool:
    """Whether some layers of a mixture of experts are dense."""
    return bool(
        config.get("mlp_only_layers")
        or config.get("first_k_dense_replace")
        or config.get("decoder_sparse_step", 1) not in (1, None)
    )


def _first(path: Path, config: dict[str, Any], names: Sequence[str]) -> int:
    """The first of these sizes that there is, else 0."""
    return next((_size(path, config, name) for name in names if config.get(name) is not None), 0)


def _size(path: Path, config: dict[str, Any], name: str) -> int:
    size = config.get(name)
    if type(size) is not int or not 1 <= size < 2**31:
        raise HdispatchError(f"{path}: {name} is {size!r}; it takes a size of at least 1")
    return size


# ---- what they call ----


@dataclass(frozen=True)
class Calls:
    """An op's calls by models, each a variant's name and the sizes of a row; and why some have no row."""

    rows: list[tuple[str, Sizes]]
    notes: list[str]


def calls_of(spec: OpSpec, models: Iterable[Model]) -> Calls:
    """What the models call an op with: the typical variant with their group, head size and weights, and their sizes.

    An op that none of them calls has no rows; so have sizes and variants that it does not serve, with a note.
    """
    rows: list[tuple[str, Sizes]] = []
    notes = []
    for model in models:
        wanted = spec.calls(model).values() if spec.calls is not None else [row for row in spec.shapes if not row]
        variant = _variant(spec, model)
        for sizes in wanted:
            if variant is None:
                notes.append(f"{spec.name}: left out for {model.name}: {_why_no_variant(spec, model)}")
            elif not any(row.items() <= sizes.items() for row in spec.shapes):
                notes.append(f"{spec.name}: left out for {model.name}: it has rows for {list(spec.shapes)}, not for {sizes}")
            else:
                rows.append((variant.name, sizes))
    return Calls([row for at, row in enumerate(rows) if row not in rows[:at]], list(dict.fromkeys(notes)))


def _integers(spec: OpSpec, model: Model) -> dict[str, int]:
    """The compiled-in integers of an op that follow from a model."""
    known = {"group": model.heads // model.kv_heads, "head_dim": model.head_dim, "head_size": model.head_dim}
    return {arg.name: known[arg.name] for arg in spec.static_args() if arg.name in known}


def _variant(spec: OpSpec, model: Model) -> Variant | None:
    """The served variant that is the typical one but for what the model says; None if there is none."""
    return _among(spec.served_variants(), spec, model)


def _why_no_variant(spec: OpSpec, model: Model) -> str:
    """What of a model's call an op's variants lack: a value, or a row in bundles that do not ask for it."""
    if (there := _among(spec.variants(), spec, model)) is not None:
        return f"its variant {there.name} is not served; `hdispatch build --ops {spec.name} --variants {there.name}` builds it"
    values = {arg.name: arg.values for arg in spec.static_args()}
    wrong = [(name, value) for name, value in _integers(spec, model).items() if value not in (values[name] or ())]
    if wrong:
        return " and ".join(f"{name} is {value}; its variants have {list(values[name] or ())}" for name, value in wrong)
    norms = "with" if model.qk_norm else "without"
    return f"no variant {norms} norms of q and k has {_integers(spec, model)}"


def _among(variants: Iterable[Variant], spec: OpSpec, model: Model) -> Variant | None:
    """Of variants the one that is an op's typical one but for what the model says; None if there is none."""
    usual = spec.typical_variant()
    static = {**usual.static, **_integers(spec, model)}
    none = usual.none - {"q_weight", "k_weight"}
    if not model.qk_norm:
        none |= {arg.name for arg in spec.tensors() if arg.optional and arg.name in ("q_weight", "k_weight")}
    return next((v for v in variants if v.static == static and v.none == none and _dtypes(v) == _dtypes(usual)), None)


def _dtypes(variant: Variant) -> dict[str, Any]:
    return {name: dtype for name, dtype in variant.dtypes.items() if name not in ("q_weight", "k_weight")}
