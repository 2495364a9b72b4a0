"""The four models of PPO, each in its engine: actor, ref, critic, reward model; and the EMA.

Shapes: B batch, R response, T sequence; N response tokens of a micro-batch.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit.config import RunConfig, exact_div, require
from rlhf_kit.ema import EMA
from rlhf_kit.hybrid_engine.engine import HybridEngine
from rlhf_kit.hybrid_engine.parked import Parked, parked_module
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.micro_batches import MicroBatch, micro_batches
from rlhf_kit.models import (
    ValueModel,
    adapters_off,
    add_lora,
    load_causal_lm,
    load_scorer,
    resolve_model,
    saved_normalisation,
)
from rlhf_kit.shared_base import SharedBase, share_base
from rlhf_kit.token_logprobs import chosen_logprobs
from rlhf_kit.tokenization import (
    ScoreBatch,
    decode_response,
    encode_scored,
    load_tokenizer,
    prepare_tokenizer,
    same_tokenizer,
    stop_token_ids,
)
from rlhf_kit.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RLHFEngine:
    """Actor, ref, critic, reward model and EMA, ready for `PPOTrainer`.

    The actor starts from a SFT model and the ref stays there. Critic and reward model start
    from the reward model's directory. With `memory.shared_base` all four are one base, under three
    adapters or none. Where the reward model has another tokenizer than the
    actor, responses are scored as re-encoded text, and the critic, which must value the actor's
    own tokens, starts from the actor's weights with a fresh head.

    DeepSpeed Chat calls this class DeepSpeedRLHFEngine; rlhf_kit exports that name too.
    """

    def __init__(
        self,
        *,
        actor_model_name_or_path: str,
        critic_model_name_or_path: str,
        tokenizer: PreTrainedTokenizerBase,
        num_total_iters: int,
        args: RunConfig,
    ):
        """`num_total_iters` rollouts decide how long the learning rate schedules are."""
        start_deepspeed()
        self.args = args
        self.tokenizer = tokenizer
        self.pad_token_id = cast(int, tokenizer.pad_token_id)
        self.device = distributed.local_device()
        ppo, ranks = args.ppo, distributed.world_size()
        local = exact_div(ppo.minibatch_size, ranks, "ppo.minibatch_size / ranks")
        if not ppo.micro_batch_tokens:
            exact_div(
                local,
                min(ppo.micro_batch_size, local),
                "ppo.minibatch_size on each rank / ppo.micro_batch_size",
            )
        updates = ppo.epochs * exact_div(
            ppo.batch_size, ppo.minibatch_size, "ppo.batch_size / ppo.minibatch_size"
        )
        actor_iterations = max(num_total_iters - ppo.critic_warmup_iterations, 1)
        distributed.seed_everything(args.seed)

        actor = load_causal_lm(actor_model_name_or_path, tokenizer, dtype=args.actor_engine.dtype)
        self.reward_tokenizer = _tokenizer_of(critic_model_name_or_path, tokenizer)
        self.shares_tokenizer = same_tokenizer(tokenizer, self.reward_tokenizer)
        require(args.actor_engine.lora.dropout == 0, "lora dropout must be 0 in PPO")
        self._ref: torch.nn.Module | None = None
        self._shared: SharedBase | None = None
        self._parked: dict[str, Parked] = {}
        if args.memory.shared_base:
            roles = self._on_one_base(actor, critic_model_name_or_path)
        else:
            roles = self._apart(actor, actor_model_name_or_path, critic_model_name_or_path)
        self.actor = HybridEngine(
            roles[0],
            args.actor_engine,
            ppo.actor_optimizer,
            total_steps=actor_iterations * updates,
            eos_token_ids=stop_token_ids(tokenizer, actor),
            pad_token_id=self.pad_token_id,
        )
        self.ema = EMA(self.actor.held, ppo.ema) if ppo.ema.enabled else None
        if args.memory.offload_idle:
            self.actor.leave()
        self.critic = TrainingEngine(
            roles[1],
            args.critic_engine,
            ppo.critic_optimizer,
            total_steps=num_total_iters * updates,
        )
        self.rest()

    def rest(self) -> None:
        """Before generation: what it does not need leaves the device, if the config says so.

        Everything comes back by itself when it is used.
        """
        if not self.args.memory.offload_idle:
            return
        self.actor.leave()
        self.critic.leave(weights=True)
        if self.ema is not None:
            self.ema.leave()

    def _frozen(self, name: str, module: Any) -> Any:
        """The module for scoring on the device, or waiting for it in host memory."""
        module.eval().requires_grad_(False)
        if self.args.memory.offload_idle:
            self._parked[name] = parked_module(module, self.device)
        return module.to(self.device)

    @contextlib.contextmanager
    def _present(self, name: str) -> Iterator[None]:
        """Inside, the frozen model `name` is on the device."""
        parked = self._parked.get(name)
        if parked is not None:
            parked.come()
        try:
            yield
        finally:
            if parked is not None:
                parked.leave()

    def _apart(
        self, actor: Any, actor_name: str, critic_name: str
    ) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Actor and critic as models of their own; makes ref and reward model too."""
        args = self.args
        if args.actor_engine.lora.rank:
            add_lora(actor, args.actor_engine.lora)
        else:
            # A copy, not loaded again: rows added for new tokens are random, and must be equal.
            self._ref = self._frozen("ref", copy.deepcopy(actor))
        scorer = load_scorer(critic_name, self.reward_tokenizer, dtype=args.critic_engine.dtype)
        self.score_mean, self.score_std = saved_normalisation(scorer)
        if self.shares_tokenizer:
            # A copy, so that the critic starts from the very scores, even of an untrained head.
            critic = ValueModel(copy.deepcopy(scorer), mean=self.score_mean, std=self.score_std)
        else:
            distributed.print_main(
                "the reward model has another tokenizer: responses are re-encoded for it, and "
                "the critic starts from the actor with a fresh head"
            )
            critic = ValueModel(
                load_scorer(actor_name, self.tokenizer, dtype=args.critic_engine.dtype)
            )
        if args.critic_engine.lora.rank:
            add_lora(critic.scorer, args.critic_engine.lora)
        self.reward = self._frozen("reward", ValueModel(scorer))
        return actor, critic

    def _on_one_base(self, actor: Any, critic_name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Actor and critic as adapters of one base; the reward model is a third."""
        self._shared = share_base(actor.to(self.device), critic_name, self.args)
        self.score_mean, self.score_std = self._shared.score_mean, self._shared.score_std
        self.reward = self._shared.reward.to(self.device).eval()
        return self._shared.actor, self._shared.critic

    @contextlib.contextmanager
    def ref(self) -> Iterator[torch.nn.Module]:
        """The frozen SFT model: a copy, or the actor with its adapters off."""
        if self._ref is not None:
            with self._present("ref"):
                yield self._ref
        elif self._shared is not None:
            with self._shared.switch.chosen(None):
                yield self.actor.module
        else:
            with adapters_off(self.actor.module):
                yield self.actor.module

    def logprobs(
        self,
        model: Callable[..., Any],
        micro: MicroBatch,
        temperature: float,
        *,
        entropy: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """[N] logprobs of response tokens under the actor or the ref, and [N] entropies."""
        return chosen_logprobs(
            model,
            micro.input_ids,
            micro.places,
            chunk=self.args.memory.logprob_chunk,
            temperature=temperature,
            entropy=entropy,
        )

    @torch.no_grad()
    def actor_logprobs(
        self, sequences: Tensor, attention_mask: Tensor, response_length: int, temperature: float
    ) -> Tensor:
        """[B, R] logprobs of the responses under the actor as it is now; 0 behind their ends."""
        (micro,) = micro_batches(sequences, attention_mask, response_length)
        found = self.logprobs(self.actor, micro, temperature)[0]
        return micro.spread(found, response_length)

    @torch.no_grad()
    def ref_logprobs(
        self, sequences: Tensor, attention_mask: Tensor, response_length: int, temperature: float
    ) -> Tensor:
        """[B, R] logprobs of the responses under the frozen SFT model; 0 behind their ends."""
        (micro,) = micro_batches(sequences, attention_mask, response_length)
        with self.ref() as ref:
            found = self.logprobs(ref, micro, temperature)[0]
        return micro.spread(found, response_length)

    def values(self, sequences: Tensor, attention_mask: Tensor, response_length: int) -> Tensor:
        """[B, R] the critic's value of the state before each response token; 0 behind the end."""
        (micro,) = micro_batches(sequences, attention_mask, response_length)
        return micro.spread(micro.before(self.critic(micro.input_ids)), response_length)

    def score(self, rollout: Rollout) -> Tensor:
        """[B] raw scores, read at each response's last token, the EOS where there is one."""
        sequences, mask = rollout.sequences, rollout.attention_mask
        length = rollout.response_ids.shape[1]
        return self.scores(rollout, micro_batches(sequences, mask, length, meet=False))

    @torch.no_grad()
    def scores(
        self,
        rollout: Rollout,
        parts: Sequence[MicroBatch],
        *,
        size: int | None = None,
        by_tokens: bool = False,
    ) -> Tensor:
        """`score` by the micro-batches of a rollout.

        Where the reward model has a tokenizer of its own, text is encoded anew, and that cut into
        micro-batches of `size`.
        """
        if not self.shares_tokenizer:
            batch = self._encoded_anew(rollout).to(self.device)
            parts = micro_batches(
                batch.input_ids,
                batch.attention_mask,
                1,
                size=size,
                by_tokens=by_tokens,
                meet=False,
            )
        scores = torch.empty(len(rollout.prompts), device=self.device)
        with self._present("reward"):
            for micro in parts:
                values = self.reward(micro.input_ids).flatten()
                scores[micro.rows] = values.index_select(0, micro.lasts)
        return scores

    def _encoded_anew(self, rollout: Rollout) -> ScoreBatch:
        """The dialogues of a rollout by the reward model's tokenizer, padded on the right."""
        responses = [
            decode_response(self.tokenizer, ids[mask].tolist())
            for ids, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)
        ]
        return encode_scored(
            self.reward_tokenizer,
            rollout.prompts.dialogues,
            responses,
            ended=rollout.ended.tolist(),
            max_length=self.args.data.max_length,
        )


def _tokenizer_of(model: str, actor_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer saved with a model; a local directory without one uses the actor's."""
    path = resolve_model(model)
    if os.path.isdir(path) and not (Path(path) / "tokenizer_config.json").is_file():
        return actor_tokenizer
    tokenizer = load_tokenizer(path)
    prepare_tokenizer(tokenizer)
    return tokenizer
