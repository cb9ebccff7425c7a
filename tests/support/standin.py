"""A stand-in for vLLM's library, whose CPU kernels note that they ran, and a bundle for what may serve its ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hdispatch
import torch
import toy
from hdispatch.integrations.vllm import Override, Route
from hdispatch.opspec import BoolArg, IntArg, OpSpec, TensorArg

#: vLLM 0.33's, as torch prints them
SCHEMAS = """
static_scaled_fp8_quant(Tensor! result, Tensor input, Tensor scale, int[]? group_shape=None) -> ()
dynamic_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale) -> ()
dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()
rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, \
Tensor!? residual) -> ()
per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, float fp8_min, \
float fp8_max, bool scale_ue8m0, bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()
per_token_group_fp8_quant_packed(Tensor input, Tensor! output_q, Tensor! output_s_packed, int group_size, float eps, \
float fp8_min, float fp8_max) -> ()
rms_norm_per_block_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, Tensor? scale_ub, \
Tensor!? residual, int group_size, bool is_scale_transposed) -> ()
silu_and_mul_per_block_quant(Tensor! out, Tensor input, Tensor! scales, int group_size, Tensor? scale_ub=None, \
bool is_scale_transposed=False) -> ()
fused_qk_norm_rope(Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps, \
Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox, Tensor position_ids, \
int forced_token_heads_per_warp=-1) -> ()
rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()
fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()
silu_and_mul(Tensor! result, Tensor input) -> ()
rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, bool is_neox, \
int rope_dim_offset=0, bool inverse=False) -> ()
cutlass_scaled_mm(Tensor! out, Tensor a, Tensor b, Tensor a_scales, Tensor b_scales, Tensor? bias) -> ()
topk_softmax(Tensor! topk_weights, Tensor! topk_indices, Tensor! token_expert_indices, Tensor gating_output, \
bool renormalize, Tensor? bias, Tensor? is_padding) -> ()
moe_sum(Tensor input, Tensor! output, Tensor? topk_ids=None, Tensor? expert_map=None) -> ()
moe_align_block_size(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_token_ids, Tensor! experts_ids, \
Tensor! num_tokens_post_pad, Tensor? maybe_expert_map, Tensor(a!)? scatter_idx=None) -> ()
reshape_and_cache_flash(Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache, Tensor slot_mapping, \
str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()
""".strip().splitlines()

#: The toy's arguments as another library may have them: no default for the last but one.
TOY = (
    "toy(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
    "Tensor? scale_ub, Tensor!? residual=None) -> ()"
)
TOY_ROUTE = {"toy": (Route("toy"),)}
_numbers = itertools.count()


def nothing(*args: object) -> None: ...


SPECS = [
    # Two ops behind one name, told apart by the sizes of the scales; only the first has a bias.
    OpSpec(
        name="by_rows",
        args=(
            TensorArg("out", ("M", "K"), (torch.bfloat16,), mutated=True, layout="rows"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            TensorArg("scales", ("M",), (torch.float32,), flat=True, broadcast=True),
            TensorArg("bias", ("K",), "a", optional=True),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
    OpSpec(
        name="by_groups",
        args=(
            TensorArg("out", ("M", "K"), (torch.bfloat16,), mutated=True, layout="rows"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            TensorArg("scales", ("M", "K/128"), (torch.float32,), layout="any"),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
    # With an argument of its own at the end.
    OpSpec(
        name="grouped",
        args=(
            TensorArg("out", ("M", "K/group_size"), (torch.float32,), mutated=True, layout="any"),
            TensorArg("a", ("M", "K"), (torch.bfloat16,)),
            IntArg("group_size", values=(64, 128)),
            BoolArg("transposed", values=None, default=False),
            BoolArg("own", default=False),
        ),
        reference=nothing,
        sample=lambda *_: [],
        shapes=({"K": 256},),
        config_key={},
        ladder=(16,),
    ),
]
for _spec in SPECS:
    if _spec.name not in hdispatch.registry.names():
        hdispatch.registry.define(_spec)


def write_bundle(folder: Path) -> Path:
    """The toy's bundle with rows for every variant of the other ops."""
    content = toy.manifest()
    for spec in SPECS:
        record = toy.record()
        record["kernel"] = spec.name
        record["grid"] = [["M"], [1], [1]]
        record["params"] = [{"kind": "ptr", "arg": "out", "align": 4}, {"kind": "i32", "value": ["M"]}]
        record["guards"] = []
        for cubin in record["cubins"].values():
            cubin.update(params=[0, 1], function=spec.name)
        content["records"].append(record)
        content["ops"][spec.name] = {
            "schema": spec.schema(),
            "ladder": list(spec.ladder),
            "variants": spec.variant_arguments(),
        }
        content["rows"] += [
            {**content["rows"][0], "op": spec.name, "variant": v, "K": 256, "bucket": 0, "record": len(content["records"]) - 1}
            for v in spec.variant_arguments()
        ]
    return toy.write(folder, content)


class Library:
    """A library of ops in a namespace of its own; `calls` are the names of the kernels that ran."""

    def __init__(self, *schemas: str, namespace: str = "", kernels: bool = True) -> None:
        self.namespace = namespace or f"standin{next(_numbers)}"
        self.torch = torch.library.Library(self.namespace, "FRAGMENT")
        self.calls: list[str] = []
        for schema in schemas:
            self.torch.define(schema)
            if kernels:
                self.add_kernel(schema.partition("(")[0])

    def add_kernel(self, name: str) -> None:
        """A kernel that notes its name; the toy's does what the toy's reference does."""

        def kernel(*args: Any) -> None:
            self.calls.append(name)
            if name == "toy":
                if args[0].shape != args[1].shape:
                    raise ValueError("the other library's own words")
                toy.reference(*args)

        self.torch.impl(name, kernel, "CPU")

    @property
    def ops(self) -> Any:
        """torch.ops.<namespace>."""
        return getattr(torch.ops, self.namespace)

    def override(self, routes: dict[str, tuple[Route, ...]] = TOY_ROUTE) -> Override:
        """What `override_vllm_ops` does, for this namespace on the CPU."""
        return Override("CPU", routes, self.namespace)

    def dump(self, name: str) -> str:
        """What torch's dispatcher has for the op."""
        return torch._C._dispatch_dump(f"{self.namespace}::{name}")


DOORS: dict[str, Callable[[Any], Callable[..., None]]] = {
    "packet": lambda packet: packet,
    "default": lambda packet: packet.default,
    "keywords": lambda packet: (
        lambda *args: packet(
            **dict(zip([arg.name for arg in toy.SPEC.args], args, strict=False)),
        )
    ),
}


def counts(op: str = "toy") -> dict[str, Any]:
    return hdispatch.stats()[op]


def hits(number: int, op: str = "toy") -> bool:
    return counts(op) == {"hits": number, "empty": 0, "fallbacks": 0, "misses": {}}


def missed(reason: str, number: int = 1, op: str = "toy") -> bool:
    return counts(op) == {"hits": 0, "empty": 0, "fallbacks": number, "misses": {reason: number}}
