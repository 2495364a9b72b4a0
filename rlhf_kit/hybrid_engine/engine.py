"""The hybrid engine: an actor that DeepSpeed trains and our decode loop generates from.

`engine.train()` and `engine.eval()` switch the mode; `generate` works in both and reads the very
parameters that the optimiser wrote a moment ago.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf_kit.config import EngineConfig, GenerationConfig, OptimizerConfig, require
from rlhf_kit.hybrid_engine.decode import Decoder, DecodeStats
from rlhf_kit.hybrid_engine.tensor_parallel import (
    TensorParallelCopy,
    gather_prompts,
    group_of,
    require_same,
    rows_of,
)
from rlhf_kit.hybrid_engine.training import TrainingEngine, rank_timeout, start_deepspeed
from rlhf_kit.hybrid_engine.weights_version import weights_version
from rlhf_kit.shared_base import Role
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
        """`model` is a transformers causal LM; responses end at any of `eos_token_ids`.

        ValueError where `config.generation_tp` divides neither the ranks of a host nor the model.
        """
        self.parallel: TensorParallelCopy | None = None
        if config.generation_tp > 1:
            start_deepspeed()
            group = group_of(config.generation_tp, rank_timeout())
            whole = model.whole if isinstance(model, Role) else model
            self.parallel = TensorParallelCopy(whole, group)
        super().__init__(model, config, optimizer, total_steps=total_steps)
        # After initialize: ZeRO moves parameters once, into its flat buffers, and never again.
        # Under ZeRO-3 a merged copy would be the whole model again, on every rank; a group's parts
        # come with their adapters merged.
        merge = config.lora.rank > 0 and config.lora.merge and config.zero_stage < 3
        self.decoder = Decoder(
            self.module if self.parallel is None else self.parallel.model,
            eos_token_ids=eos_token_ids,
            pad_token_id=pad_token_id,
            captured=None if config.cuda_graphs else False,
            merge_adapters=merge and self.parallel is None,
        )

    def train(self) -> None:
        """Training mode; what generation holds is freed, unless `keep_cache`."""
        self.end_generation()
        super().train()

    def end_generation(self) -> None:
        """Free what generation holds, unless `keep_cache`; the next `generate` makes it again."""
        if not self.config.keep_cache:
            self.decoder.release()

    def generate(self, prompts: PromptBatch, generation: GenerationConfig) -> Rollout:
        """Sample one response to each prompt from the current weights; all ranks must call it.

        With `generation_tp` t, a group decodes the prompts of its t ranks together, in t times
        `generation.slots`: a rank's part of the cache is as large as alone.
        """
        if self.parallel is not None:
            return self._generate_together(self.parallel, prompts, generation)
        with self._whole_parameters():
            return self.decoder.generate(prompts, generation)

    def _generate_together(
        self, parallel: TensorParallelCopy, prompts: PromptBatch, generation: GenerationConfig
    ) -> Rollout:
        """Groups go their own ways until all of their rows have ended."""
        slots = generation.slots * parallel.ranks
        generation = dataclasses.replace(generation, slots=slots)
        together, mine = gather_prompts(prompts, parallel.group)
        try:
            parallel.update(weights_version(self.module))
            rollout = self.decoder.generate(together, generation)
        finally:
            if not self.config.keep_cache:
                self.free_generation_weights()
        require_same(rollout, parallel.group)
        return rows_of(rollout, mine, prompts)

    def free_generation_weights(self) -> None:
        """Give back the memory of this rank's part of the tensor-parallel copy, if it has any."""
        if self.parallel is None:
            return
        self.decoder.release()  # captured steps read these addresses
        self.parallel.free()

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
