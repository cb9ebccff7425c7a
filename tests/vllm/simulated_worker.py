"""A process of `bench serve` whose engine is the simulation."""

from __future__ import annotations

from typing import Any

import simulation


def main() -> None:
    engine = simulation.start()

    def small(**options: Any) -> Any:
        limits = {"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "block_size": 16}
        return engine(**(options | limits | {"worker_cls": "simulation.SimulatedWorker"}))

    import vllm

    vllm.LLM = small
    from hdispatch.bench import serve_worker

    serve_worker.SKIP, serve_worker.STEPS = 2, 4
    serve_worker.main()


if __name__ == "__main__":
    main()
