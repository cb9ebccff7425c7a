"""The logits of a vLLM engine against a float32 evaluation of the same weights, on the same tokens in every mode.

Greedy tokens cannot be compared: any change of a rounding lets them part at a near tie. So the tokens are forced, by position,
and each step's logits are compared with those of the reference. What is compared between modes is how far each is from it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch

#: Tokens of the prompts of a group: all of them fit one prefill.
PROMPT_TOKENS = 4096
SHORTEST = 5
#: Requests that run at once.
GROUP = 32
#: Steps past which the reference's rows are looked at: a vocabulary of 152 k takes 39 MB each 64 in float32.
LOGIT_ROWS = 64


class Errors(TypedDict):
    """How far logits are from the reference, [request][step]; step 0 is the prefill.

    relative  |logits - reference| / |reference|
    kl        Kullback-Leibler divergence from the reference, nats
    """

    relative: list[list[float]]
    kl: list[list[float]]


# ---- comparing ----


@dataclass(frozen=True)
class Ratio:
    """An error divided by another; `noise` is the standard error of the ratio, from its spread over requests."""

    value: float
    noise: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.noise:.4f}"


def average(errors: Errors, name: str, steps: slice = slice(None)) -> float:
    """Over requests and steps: the root of the mean square of relative errors, the mean of divergences."""
    power = _power(name)
    return float(statistics.fmean(_row_means(errors, name, steps)) ** (1 / power))


def compare(ours: Errors, theirs: Errors, name: str, steps: slice = slice(None)) -> Ratio:
    """Compares `average` of ours with that of theirs, on the same requests."""
    power = _power(name)
    a, b = (_row_means(each, name, steps) for each in (ours, theirs))
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    if not mean_b > 0 or not math.isfinite(mean_a):
        return Ratio(math.nan, math.nan)
    spread = [(x / mean_a - y / mean_b) / power for x, y in zip(a, b, strict=True)] if mean_a > 0 else [0.0]
    value = (mean_a / mean_b) ** (1 / power)
    noise = value * statistics.stdev(spread) / len(spread) ** 0.5 if len(spread) > 1 else math.nan
    return Ratio(value, noise)


def compare_steps(ours: Errors, theirs: Errors, name: str) -> list[Ratio]:
    """`compare` of each step alone."""
    return [compare(ours, theirs, name, slice(step, step + 1)) for step in range(len(theirs["kl"][0]))]


def _power(name: str) -> int:
    return {"relative": 2, "kl": 1}[name]


def _row_means(errors: Errors, name: str, steps: slice) -> list[float]:
    """Of each request, the mean over steps of what is summed over requests."""
    rows = errors["relative"] if name == "relative" else errors["kl"]
    return [statistics.fmean(each ** _power(name) for each in row[steps]) for row in rows]


# ---- measuring ----


def groups(requests: int) -> list[range]:
    """Requests by number, in groups of at most GROUP that run at once."""
    return [range(first, min(first + GROUP, requests)) for first in range(0, requests, GROUP)]


def lengths(requests: int) -> list[int]:
    """Tokens of the prompt of each request of a group, all different: they tell requests apart."""
    pairs = max(1, requests * (requests - 1) // 2)
    step = min(7, (PROMPT_TOKENS - SHORTEST * requests) // pairs)
    if step < 1:
        raise ValueError(f"{requests} requests of different lengths do not fit a prefill of {PROMPT_TOKENS} tokens")
    return [SHORTEST + step * request for request in range(requests)]


def forced(position: torch.Tensor) -> torch.Tensor:
    """The token that follows the one at a position, of any request."""
    return (position.long() * 7919 + 13) % 997 + 10


def prompt(request: int, length: int) -> list[int]:
    """Tokens of a request's prompt."""
    return [(13 * request + 5 * j) % 1000 + 10 for j in range(length)]


def sequence(request: int, length: int, steps: int) -> torch.Tensor:
    """The prompt and the forced tokens that `steps` steps read: [length + steps - 1]."""
    following = forced(torch.arange(length - 1, length + steps - 2))
    return torch.cat([torch.tensor(prompt(request, length)), following])


def measure(llm: Any, runner: Any, model: Any, steps: int, requests: int) -> Errors:
    """Run `requests` requests, a group after the other, evaluate the reference, and compare."""
    errors: Errors = {"relative": [], "kl": []}
    for numbers in groups(requests):
        sizes = lengths(len(numbers))
        found = forced_logits(llm, runner, sizes, steps, first=numbers.start)
        device = found[0].device
        hidden = reference(
            model, [sequence(number, size, steps).to(device) for number, size in zip(numbers, sizes, strict=True)]
        )
        for logits, rows, size in zip(found, hidden, sizes, strict=True):
            one = [
                _compare_logits(part, head(model, of))
                for part, of in zip(torch.split(logits, LOGIT_ROWS), torch.split(rows[size - 1 :], LOGIT_ROWS), strict=True)
            ]
            errors["relative"].append([each for part, _ in one for each in part])
            errors["kl"].append([each for _, part in one for each in part])
    return errors


def _compare_logits(found: torch.Tensor, expected: torch.Tensor) -> tuple[list[float], list[float]]:
    """The errors of rows of logits."""
    found = found.float()
    relative = (found - expected).norm(dim=-1).double() / expected.norm(dim=-1).double()
    log_p, log_q = expected.log_softmax(-1), found.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    return relative.tolist(), kl.tolist()


class _Around:
    """Stands for vLLM's sampler: each of its calls goes to `call`."""

    def __init__(self, sampler: Any, call: Any) -> None:
        self._sampler, self._call = sampler, call

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        return self._call(logits, input_batch)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)


def forced_logits(
    llm: Any, runner: Any, sizes: Sequence[int], steps: int, order: Sequence[int] | None = None, first: int = 0
) -> list[torch.Tensor]:
    """Logits [steps, vocabulary] of each request. All requests run at once; `sizes` are their prompts' lengths, all different.

    order  in which the requests are given to the engine, and so lie in its batches
    first  number of the first request
    """
    from vllm import SamplingParams

    rows: list[list[torch.Tensor]] = [[] for _ in sizes]
    numbers: dict[str, int] = {}
    sampler = runner.sampler

    def force(logits: torch.Tensor, now: Any) -> Any:
        output = sampler(logits, now)
        positions = now.positions[now.logits_indices]
        if not numbers:  # the prefill: the lengths say which request is which
            numbers.update(zip(now.req_ids, map(sizes.index, now.seq_lens[: len(now.req_ids)].tolist()), strict=True))
        for row, name in enumerate(now.req_ids):
            rows[numbers[name]].append(logits[row].clone())
        sampled = output.sampled_token_ids
        sampled.copy_(forced(positions).view_as(sampled).to(sampled.dtype))
        return output

    runner.sampler = _Around(sampler, force)
    try:
        sampling = SamplingParams(max_tokens=steps, ignore_eos=True, detokenize=False, temperature=0.0)
        order = range(len(sizes)) if order is None else order
        prompts = [{"prompt_token_ids": prompt(first + request, sizes[request])} for request in order]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    finally:
        runner.sampler = sampler
    for request, output in zip(order, outputs, strict=True):
        expected = forced(torch.arange(sizes[request] - 1, sizes[request] + steps - 1)).tolist()
        if list(output.outputs[0].token_ids) != expected:
            raise RuntimeError(f"request {request} did not get the forced tokens")
    counts = {len(each) for each in rows}
    if counts != {steps}:
        raise RuntimeError(f"requests have {sorted(counts)} rows of logits; expected {steps} of each")
    return [torch.stack(each) for each in rows]


# ---- the reference ----


@torch.no_grad()
def reference(model: Any, sequences: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states [tokens, hidden] after the last norm, in float32, of each sequence through a decoder of vLLM's (Qwen3,
    Qwen2, Llama), from its own weights.

    sequences  int64 token ids, one tensor a request

    Activations are never quantized or rounded: only the weights are what the checkpoint has.
    """
    with _Float32():
        decoder, sizes = model.model, [each.numel() for each in sequences]
        x = decoder.embed_tokens.weight.detach()[torch.cat(list(sequences))].float()
        for layer in decoder.layers:
            x = x + _linear(layer.self_attn.o_proj, _attend(layer.self_attn, _normed(layer.input_layernorm, x), sizes))
            x = x + _mlp(layer.mlp, _normed(layer.post_attention_layernorm, x))
        return list(torch.split(_normed(decoder.norm, x), sizes))


@torch.no_grad()
def head(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] in float32 of hidden states."""
    with _Float32():
        return _product(x, model.lm_head.weight.detach())[:, : model.config.vocab_size]


class _Float32:
    """A block in which float32 products are not made in TF32."""

    def __enter__(self) -> None:
        self._former = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = self._former


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x times a 16-bit [N, K], in float32, 16384 rows of it at a time."""
    return torch.cat([x @ part.float().t() for part in torch.split(weight, 16384)], dim=-1)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.variance_epsilon)
    weight: torch.Tensor = norm.weight.detach()
    return y * weight.float()


def _mlp(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    gate, up = _linear(mlp.gate_up_proj, x).chunk(2, dim=-1)
    return _linear(mlp.down_proj, torch.nn.functional.silu(gate) * up)


def _attend(attention: Any, x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_dim
    qkv = _linear(attention.qkv_proj, x).view(x.size(0), -1, size)
    return torch.cat([_attend_one(attention, each, heads, kv_heads) for each in torch.split(qkv, list(sizes))])


def _attend_one(attention: Any, qkv: torch.Tensor, heads: int, kv_heads: int) -> torch.Tensor:
    """Causal attention of one sequence: qkv [tokens, heads of q, k and v, head size] -> [tokens, heads * head size]."""
    n, _, size = qkv.shape
    q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
    if getattr(attention, "q_norm", None) is not None:
        q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
    q, k = (_rotated(attention.rotary_emb, each) for each in (q, k))
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.attn.impl.scale
    scores.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=qkv.device).triu(1), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(n, heads * size)


def _rotated(rope: Any, x: torch.Tensor) -> torch.Tensor:
    """NeoX rotation by the angles of vLLM's cache. It has 16 bits, as weights have: that is no rounding of a step."""
    if not rope.is_neox_style:
        raise RuntimeError("the reference rotates NeoX pairs only")
    cos, sin = rope.cos_sin_cache[: x.size(0)].float().unsqueeze(1).chunk(2, dim=-1)
    a, b = x[..., : cos.size(-1)], x[..., cos.size(-1) : 2 * cos.size(-1)]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * cos.size(-1) :]], dim=-1)


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A quantized or plain linear layer on float32."""
    y = x @ dequantized(module).t()
    if module.bias is not None:
        y += module.bias.detach().float()
    return y


def dequantized(module: Any) -> torch.Tensor:
    """The weight [N, K] of a vLLM linear layer in float32."""
    weight: torch.Tensor = module.weight.detach()
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    inverse = getattr(module, "weight_scale_inv", None)
    scale: torch.Tensor = (module.weight_scale if inverse is None else inverse).detach().float()
    if getattr(module, "weight_block_size", None) is not None:
        n, k = weight.shape
        spread = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
        return weight.float() * spread
    by_rows = weight if weight.stride(-1) == 1 else weight.t()
    return by_rows.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
