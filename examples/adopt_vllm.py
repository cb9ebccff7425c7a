"""vLLM with every Triton kernel that it launches served from C++, by one line. Its output is the same.

VLLM_ENABLE_V1_MULTIPROCESSING=0 python examples/adopt_vllm.py MODEL     needs vLLM and a GPU; else it says what it would do
"""

from __future__ import annotations

import importlib.util
import sys

import hdispatch
import torch


def main() -> None:
    """Two batches: the first meets the keys, the second is served."""
    hdispatch.adopt()  # the one line, in the process that launches
    if len(sys.argv) < 2 or importlib.util.find_spec("vllm") is None or not torch.cuda.is_available():
        print("all Triton kernels are adopted; serving needs a MODEL, vLLM and a GPU")
        return
    from vllm import LLM, SamplingParams

    engine = LLM(sys.argv[1], enforce_eager=True)
    prompts, params = ["The capital of France is", "Two and two are"], SamplingParams(temperature=0, max_tokens=32)
    engine.generate(prompts, params)
    hdispatch.stats(reset=True)
    for each in engine.generate(prompts, params):
        print(each.outputs[0].text)
    counted = [each for name, each in hdispatch.stats().items() if name.startswith("adopted ")]
    hits, others = (sum(each[what] for each in counted) for what in ("hits", "fallbacks"))
    print(f"{hits} launches from C++, {others} Triton's own")


if __name__ == "__main__":
    main()
