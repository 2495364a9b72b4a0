"""The hybrid engine: an actor that DeepSpeed trains and our decode loop generates from.

`engine.train()` and `engine.eval()` switch the mode; `generate` works in both and reads the very
parameters that the optimiser wrote a moment ago.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig, require
from rlhf_kit.hybrid_engine.decode import Decoder, DecodeStats
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.types import PromptBatch, Rollout


class HybridEngine(TrainingEngine):
    """A `TrainingEngine` whose module is a causal LM, with an inference mode beside it."""

    def __init__(
        self,
        model: Any,
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
    ):
        """`model` is a transformers causal LM; responses end at any of `eos_token_ids`."""
        super().__init__(model, config, optimizer, total_steps=total_steps)
        # After initialize: ZeRO moves parameters once, into its flat buffers, and never again.
        # Under ZeRO-3 a merged copy would be the whole model again, on every rank.
        merge = config.lora.rank > 0 and config.lora.merge and config.zero_stage < 3
        self.decoder = Decoder(
            self.module,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            captured=None if config.cuda_graphs else False,
            merge_adapters=merge,
        )

    def train(self) -> None:
        """Training mode; what generation holds is freed, unless `keep_cache`."""
        if not self.config.keep_cache:
            self.decoder.release()
        super().train()

    def generate(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
        """Sample one response to each prompt from the current weights."""
        with self._whole_parameters():
            return self.decoder.generate(prompts, generation)

    @property
    def last_stats(self) -> DecodeStats:
        """Tokens and seconds of the last `generate`."""
        stats = self.decoder.last_stats
        require(stats is not None, "nothing has been generated yet")
        assert stats is not None
        return stats

    @contextlib.contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """Under ZeRO-3, gather the shards and take DeepSpeed's hooks off for the duration.

        A forward inside a plain `GatheredParameters` may partition the parameters again behind
        its back; `unwrap_model_for_generation` removes the hooks that do so.
        """
        if self.config.zero_stage < 3:
            yield
            return
        from deepspeed.runtime.zero import unwrap_model_for_generation

        raised: Exception | None = None
        with unwrap_model_for_generation(self.deepspeed):
            try:
                yield
            except Exception as error:  # DeepSpeed puts its hooks back at a regular end alone
                raised = error
        if raised is not None:
            raise raised
