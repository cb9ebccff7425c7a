"""The logits of a vLLM engine against a float32 evaluation of the same weights, on the same tokens in every mode.

Greedy tokens cannot be compared: any change of a rounding lets them part at a near tie. So the tokens are forced, by position,
and each step's logits are compared with those of the reference.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

#: Tokens of the prompts: one of each request; all of them fit one prefill.
PROMPTS = (5, 17, 32, 33, 64, 100, 128, 300)
#: Rows of logits that are evaluated at a time: a vocabulary of 152 k takes 39 MB each 64 in float32.
LOGIT_ROWS = 64


def forced(position: torch.Tensor) -> torch.Tensor:
    """The token that follows the one at a position, of any request."""
    return (position.long() * 7919 + 13) % 997 + 10


def prompt(request: int) -> list[int]:
    """Tokens of a request's prompt."""
    return [(13 * request + 5 * j) % 1000 + 10 for j in range(PROMPTS[request])]


def sequence(request: int, steps: int) -> torch.Tensor:
    """The prompt and the forced tokens that `steps` steps read: [prompt + steps - 1]."""
    start = prompt(request)
    following = forced(torch.arange(len(start) - 1, len(start) + steps - 2))
    return torch.cat([torch.tensor(start), following])


def measure(llm: Any, runner: Any, model: Any, steps: int, file: Path) -> dict[str, Any]:
    """Run, evaluate the reference, and compare.

    {"relative": [error of step 0, …], "kl": […]}: |logits - reference| / |reference| over all requests, and the
    Kullback-Leibler divergence from the reference in nats, a mean over requests. Step 0 is the prefill. `file` gets both for
    each request too, as a torch file.
    """
    found = _run(llm, runner, steps)
    relative, kl = torch.zeros(len(PROMPTS), steps), torch.zeros(len(PROMPTS), steps)
    squares, norms = torch.zeros(steps, dtype=torch.float64), torch.zeros(steps, dtype=torch.float64)
    for request, size in enumerate(PROMPTS):
        expected = reference(model, sequence(request, steps).to(found[request].device), size - 1)
        difference = (found[request].float() - expected).norm(dim=-1).double().cpu()
        norm = expected.norm(dim=-1).double().cpu()
        squares += difference**2
        norms += norm**2
        relative[request] = difference / norm
        log_p, log_q = expected.log_softmax(-1), found[request].float().log_softmax(-1)
        kl[request] = (log_p.exp() * (log_p - log_q)).sum(-1).cpu()
    torch.save({"relative": relative, "kl": kl}, file)
    return {"relative": (squares / norms).sqrt().tolist(), "kl": kl.mean(0).tolist()}


def _run(llm: Any, runner: Any, steps: int) -> list[torch.Tensor]:
    """Logits [steps, vocabulary] of each request, all of which run at once."""
    from vllm import SamplingParams

    rows: dict[int, list[torch.Tensor]] = {request: [] for request in range(len(PROMPTS))}
    batch: list[Any] = []
    numbers: dict[str, int] = {}
    sample, sampler = runner.sample, runner.sampler.sample

    def note_batch(hidden: torch.Tensor, input_batch: Any, grammar: Any) -> Any:
        batch[:] = [input_batch]
        return sample(hidden, input_batch, grammar)

    def force(logits: torch.Tensor, *given: Any, **named: Any) -> Any:
        sampled, processed = sampler(logits, *given, **named)
        now = batch[0]
        positions = now.positions[now.logits_indices]
        if not numbers:  # the prefill: the lengths say which request is which
            numbers.update(zip(now.req_ids, map(PROMPTS.index, now.seq_lens[: len(now.req_ids)].tolist()), strict=True))
        for row, name in enumerate(now.req_ids):
            rows[numbers[name]].append(logits[row].clone())
        sampled.copy_(forced(positions).view_as(sampled).to(sampled.dtype))
        return sampled, processed

    runner.sample, runner.sampler.sample = note_batch, force
    try:
        sampling = SamplingParams(max_tokens=steps, ignore_eos=True, detokenize=False, temperature=0.0)
        prompts = [{"prompt_token_ids": prompt(request)} for request in range(len(PROMPTS))]
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    finally:
        del runner.sample, runner.sampler.sample
    for request, output in enumerate(outputs):
        start = len(prompt(request))
        expected = forced(torch.arange(start - 1, start + steps - 1)).tolist()
        if list(output.outputs[0].token_ids) != expected:
            raise RuntimeError(f"request {request} did not get the forced tokens")
    lengths = {len(each) for each in rows.values()}
    if lengths != {steps}:
        raise RuntimeError(f"requests have {sorted(lengths)} rows of logits; expected {steps} of each")
    return [torch.stack(rows[request]) for request in range(len(PROMPTS))]


# ---- the reference ----


@torch.no_grad()
def reference(model: Any, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Logits [tokens - first, vocabulary] in float32 of a decoder of vLLM's (Qwen3, Qwen2, Llama), from its own weights.

    tokens  int64 [n], one request
    first   the first position whose logits are wanted

    Activations are never quantized or rounded: only the weights are what the checkpoint has.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _reference(model, tokens, first)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _reference(model: Any, tokens: torch.Tensor, first: int) -> torch.Tensor:
    decoder = model.model
    x = decoder.embed_tokens.weight.detach()[tokens].float()
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        x = x + _linear(attention.o_proj, _attend(attention, _normed(layer.input_layernorm, x)))
        gate, up = _linear(mlp.gate_up_proj, _normed(layer.post_attention_layernorm, x)).chunk(2, dim=-1)
        x = x + _linear(mlp.down_proj, torch.nn.functional.silu(gate) * up)
    x = _normed(decoder.norm, x[first:])
    head = model.lm_head.weight.detach()
    return torch.cat([_product(part, head) for part in torch.split(x, LOGIT_ROWS)])[:, : model.config.vocab_size]


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x times a 16-bit [N, K], in float32, 16384 rows of it at a time."""
    return torch.cat([x @ part.float().t() for part in torch.split(weight, 16384)], dim=-1)


def _normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + norm.variance_epsilon)
    weight: torch.Tensor = norm.weight.detach()
    return y * weight.float()


def _attend(attention: Any, x: torch.Tensor) -> torch.Tensor:
    n, heads, kv_heads, size = x.size(0), attention.num_heads, attention.num_kv_heads, attention.head_dim
    q, k, v = torch.split(_linear(attention.qkv_proj, x).view(n, -1, size), [heads, kv_heads, kv_heads], dim=1)
    if getattr(attention, "q_norm", None) is not None:
        q, k = _normed(attention.q_norm, q), _normed(attention.k_norm, k)
    q, k = (_rotated(attention.rotary_emb, each) for each in (q, k))
    k, v = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * attention.attn.impl.scale
    scores.masked_fill_(torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
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
