"""An engine with a random model, and the measurement of its decoding."""

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_check import streams
from benchmarks.gpu_check.bandwidth import measure_bandwidth
from benchmarks.gpu_check.cells import Cells, Figures
from benchmarks.gpu_check.plan import Plan
from benchmarks.gpu_check.random_model import random_decoder
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.kernels.select import Kernels


@dataclass(frozen=True)
class Subject:
    engine: Engine
    attention: str
    weight_bytes: int
    """Weights that every step reads, whatever its batch."""
    kv_bytes_per_token: float

    @classmethod
    def build(
        cls, plan: Plan, kernels: Kernels, *, max_num_seqs: int, context: int, block_size: int, **options: Any
    ) -> "Subject":
        """Build an engine for prompts of at most `context` tokens.

        options: other fields of `EngineConfig`.
        """
        model, weight_bytes = random_decoder(plan, kernels)
        config = EngineConfig(
            "random weights",
            device=plan.device,
            dtype=plan.dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=plan.num_batched_tokens,
            # And the spare block that the scheduler requires.
            max_model_len=context + streams.num_tokens(plan, max_num_seqs, context) + block_size,
            block_size=block_size,
            enable_prefix_caching=False,
            **options,
        )
        engine = Engine(config, model=model)
        return cls(
            engine, kernels.attention.name, weight_bytes, model.bytes_per_block(block_size) / block_size
        )

    def warm_up(self, plan: Plan) -> None:
        """Compile and load whatever a first step would wait for."""
        self.decode(plan, 1, min(plan.contexts), bytes_per_s=None)

    def decode(self, plan: Plan, batch: int, context: int, *, bytes_per_s: float | None) -> Figures:
        """Prefill `batch` prompts of `context` tokens, and decode.

        The share of the roofline is that of the mean step; the median, which stalls do not affect, is
        reported too. The prefill rate counts prompt tokens only, though sequences that have begun decode
        meanwhile.

        bytes_per_s: the device's bandwidth; None if unknown.
        """
        try:
            prefill_s, mean_len = streams.start(self.engine, batch, context, plan)
            step_s, median_s = streams.decode(self.engine, batch, plan)
        finally:
            streams.finish(self.engine)
        mean_len += plan.num_timed_steps / 2
        step_bytes = self.weight_bytes + batch * mean_len * self.kv_bytes_per_token
        return {
            "tokens_per_s": batch / step_s,
            "step_ms": 1e3 * step_s,
            "median_step_ms": 1e3 * median_s,
            "mean_len": mean_len,
            "step_bytes": step_bytes,
            "roofline_share": step_bytes / bytes_per_s / step_s if bytes_per_s else None,
            "prefill_tokens_per_s": batch * context / prefill_s,
        }


def bandwidth(plan: Plan, cells: Cells) -> float | None:
    """Measure the bandwidth in bytes per second; None if that failed."""
    figures = cells.run("bandwidth", {}, measure_bandwidth, plan.bandwidth_bytes, torch.device(plan.device))
    return figures["bytes_per_s"] if figures else None
