"""Stage 3: proximal policy optimisation.

`generate_experience(prompts)` samples and scores, `step(experience)` learns, for as many epochs
and minibatches as the config says. Shapes: B batch, R response tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_kit import distributed
from rlhf_kit import functional as f
from rlhf_kit.config import GenerationConfig, RunConfig, require
from rlhf_kit.metrics import Phases
from rlhf_kit.mixture import MixtureLoss, gradient_norm
from rlhf_kit.models import response_logits
from rlhf_kit.rlhf_engine import RLHFEngine, trim
from rlhf_kit.rollout import make_experience, restored_rollout, rollout_state
from rlhf_kit.tokenization import Encoded
from rlhf_kit.training_state import State, Stateful
from rlhf_kit.types import Experience, PromptBatch, Rollout

EMA_DISTANCE_EVERY = 10
"""Iterations between two measurements of the average's distance; the first is measured too."""


def _count(mask: Tensor) -> int:
    """Tokens under the masks of all ranks."""
    return int(distributed.all_sum(mask.sum()))


class PPOTrainer:
    """The PPO loop's two calls, and the state between them: KL coefficient and counters.

    DeepSpeed Chat calls this class DeepSpeedPPOTrainer; rlhf_kit exports that name too.
    """

    def __init__(
        self,
        *,
        engine: RLHFEngine,
        args: RunConfig,
        mixture_rows: Sequence[Encoded] | None = None,
    ):
        """`mixture_rows` are tokenized texts for the mixture loss; without any it is off."""
        self.engine = engine
        self.args = args
        self.config = args.ppo
        self.generation: GenerationConfig = args.generation
        self.kl_coef = self.config.kl.coef
        self.iteration = 0
        self.phases = Phases()
        self.last_rollout: Rollout | None = None
        self.mixture: MixtureLoss | None = None
        if mixture_rows and self.config.mixture.kind != "none":
            self.mixture = MixtureLoss(mixture_rows, engine, args)
        elif self.config.mixture.kind != "none":
            distributed.print_main("no texts for the mixture loss were given: it is off")
        self.metrics: dict[str, float] = {}
        self._rollout_metrics: dict[str, float] = {}
        self._pending: Experience | None = None
        self._resumed: State | None = None

    def generate_experience(self, prompts: PromptBatch) -> Experience:
        """Sample a response to each of this rank's prompts [B, P] and score it.

        After a resume the experience that the checkpoint holds for these prompts comes back.
        """
        if self._resumed is not None:
            found = restored_rollout(self._resumed, prompts, self.engine.device)
            if found is not None:
                self._rollout_metrics = self._resumed["metrics"]
                self.last_rollout, self._pending = found
                return self._pending
        with self.phases("generate") as phase:
            self.engine.actor.eval()
            rollout = self.engine.actor.generate(prompts.to(self.engine.device), self.generation)
            phase.tokens += _count(rollout.response_mask)
        self.last_rollout = rollout
        with self.phases("score") as phase:
            experience, self._rollout_metrics = make_experience(
                rollout,
                self.engine,
                self.config,
                kl_coef=self.kl_coef,
                temperature=self.generation.temperature,
            )
            phase.tokens += _count(experience.attention_mask)
        self._pending = experience
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """`step`, returning the actor's and the critic's mean loss as DeepSpeed Chat does."""
        metrics = self.step(experience)
        return metrics.get("policy/loss", 0.0), metrics["value/loss"]

    def step(self, experience: Experience) -> dict[str, float]:
        """All epochs and minibatches over one experience; returns the iteration's metrics."""
        with self.phases("train") as phase:
            metrics = self._train(experience)
            phase.tokens += int(_count(experience.attention_mask) * metrics["ppo/epochs_done"])
        metrics = {**self._rollout_metrics, **metrics, "objective/kl_coef": self.kl_coef}
        if self.config.kl.kind == "adaptive" and "objective/kl" in metrics:
            self.kl_coef = f.next_kl_coef(
                self.kl_coef,
                kl=metrics["objective/kl"],
                target=self.config.kl.target,
                horizon=self.config.kl.horizon,
                n=self.config.batch_size,
            )
        self.iteration += 1
        self._pending = self._resumed = None
        measured = self.iteration == 1 or self.iteration % EMA_DISTANCE_EVERY == 0
        if self.engine.ema is not None and measured:
            metrics["ema/distance"] = self.engine.ema.distance()
        self.metrics = {**metrics, **self._speed()}
        return self.metrics

    def _speed(self) -> dict[str, float]:
        lap = self.phases.lap()
        speed = {"perf/pairs_per_second": self.config.batch_size / max(sum(lap.values()), 1e-9)}
        if seconds := lap.get("phase/generate/seconds"):
            tokens = self._rollout_metrics["response/length"] * self.config.batch_size
            speed["perf/generated_tokens_per_second"] = tokens / seconds
        return {**lap, **speed}

    def _train(self, experience: Experience) -> dict[str, float]:
        self.engine.actor.train()
        self.engine.critic.train()
        minibatch = self.config.minibatch_size // distributed.world_size()
        train_actor = self.iteration >= self.config.critic_warmup_iterations
        history: dict[str, list[float]] = defaultdict(list)
        epochs_done = 0.0
        for epoch in range(self.config.epochs):
            for index in self._order(len(experience), epoch).split(minibatch):
                metrics = self._minibatch(experience.rows(index), train_actor=train_actor)
                for key, value in metrics.items():
                    history[key].append(value)
                epochs_done += len(index) / len(experience)
                if train_actor and self._diverged(metrics):
                    break
            else:
                continue
            break
        means = {key: sum(values) / len(values) for key, values in history.items()}
        return {**means, "ppo/epochs_done": epochs_done}

    def _order(self, rows: int, epoch: int) -> Tensor:
        """The rows' order in an epoch: as sampled in the first, a fresh permutation after it.

        Prompts come in random order already, and the first epoch's micro-batches must be the
        ones that old logprobs were computed in.
        """
        if epoch == 0:
            return torch.arange(rows)
        seed = distributed.derive_seed("ppo", self.args.seed, self.iteration, epoch)
        return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))

    def _diverged(self, metrics: dict[str, float]) -> bool:
        """Whether the approximate KL of this minibatch (of all ranks) is over the limit."""
        return 0 < self.config.max_approx_kl < metrics["policy/approx_kl"]

    def _minibatch(self, experience: Experience, *, train_actor: bool) -> dict[str, float]:
        """One optimiser step of actor and critic on the rows of one minibatch."""
        tokens = float(distributed.all_sum(experience.response_mask.sum().double()))
        totals: dict[str, Tensor] = {}
        if train_actor and self.mixture is not None:
            self.mixture.measure(self._policy_gradient_norm, experience, tokens)
        for index in torch.arange(len(experience)).split(self.config.micro_batch_size):
            micro = experience.rows(index)
            parts = self._value_backward(micro, tokens)
            if train_actor:
                loss, metrics = self._policy(self.engine.actor, micro, tokens)
                self.engine.actor.backward(loss)
                parts |= {"policy/loss": loss.detach(), **metrics}
            for key, value in parts.items():
                totals[key] = totals[key] + value.detach() if key in totals else value.detach()
        summed = distributed.all_sum(torch.stack([v.double() for v in totals.values()]))
        metrics = dict(zip(totals, summed.tolist(), strict=True))
        critic = self.engine.critic.step()
        metrics |= {
            "optim/critic_grad_norm": critic.grad_norm,
            "optim/critic_lr": critic.learning_rate,
        }
        if train_actor:
            metrics |= self._actor_step()
            mean = metrics["policy/ratio_mean"]
            metrics["policy/ratio_var"] = max(metrics.pop("policy/ratio_square") - mean**2, 0.0)
        self._check_finite(metrics)
        return metrics

    def _policy(
        self, actor: Any, micro: Experience, tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss of a micro-batch, as its share of the minibatch's mean."""
        length = micro.response_mask.shape[1]
        ids, mask, kept, _ = trim(micro.sequences, micro.attention_mask, length)
        response_mask = micro.response_mask[:, :kept]
        logits = response_logits(actor, ids, mask, kept)
        temperature = self.generation.temperature
        logprobs = f.token_logprobs(logits, ids[:, -kept:], temperature=temperature)
        old_logprobs = micro.old_logprobs[:, :kept]
        weights = None
        if self.config.old_logprobs == "corrected":
            # Truncated importance sampling: the engine sampled from rollout_logprobs.
            gap = old_logprobs - micro.rollout_logprobs[:, :kept]
            weights = gap.exp().clamp(max=self.config.importance_cap)
        loss, metrics = f.policy_loss(
            logprobs,
            old_logprobs,
            micro.advantages[:, :kept],
            response_mask,
            clip_ratio=self.config.clip_ratio,
            dual_clip=self.config.dual_clip,
            importance_weights=weights,
            denominator=tokens,
        )
        with torch.no_grad():
            entropy = f.entropy(logits, temperature=temperature)
            metrics["objective/entropy"] = f.masked_sum(entropy, response_mask) / tokens
        return loss, metrics

    def _value_backward(self, micro: Experience, tokens: float) -> dict[str, Tensor]:
        length = micro.response_mask.shape[1]
        ids, mask, kept, _ = trim(micro.sequences, micro.attention_mask, length)
        loss, metrics = f.value_loss(
            self.engine.values(ids, mask, kept),
            micro.values[:, :kept],
            micro.returns[:, :kept],
            micro.response_mask[:, :kept],
            value_clip=self.config.value_clip,
            denominator=tokens,
        )
        self.engine.critic.backward(loss)
        return {"value/loss": loss.detach(), **metrics}

    def _policy_gradient_norm(
        self, experience: Experience, tokens: float, probes: Sequence[Tensor]
    ) -> float:
        """Norm of the whole minibatch's policy gradient on `probes`, without stepping.

        On the bare module: DeepSpeed allows no second way to call backward through its engine.
        """
        total = [torch.zeros_like(p, dtype=torch.float32) for p in probes]
        for index in torch.arange(len(experience)).split(self.config.micro_batch_size):
            loss, _ = self._policy(self.engine.actor.module, experience.rows(index), tokens)
            for sum_, grad in zip(total, torch.autograd.grad(loss, probes), strict=True):
                sum_ += grad
        return gradient_norm(total)

    def _actor_step(self) -> dict[str, float]:
        """The mixture loss, the optimiser step of the actor, and the average after it."""
        metrics = self.mixture.backward() if self.mixture is not None else {}
        actor = self.engine.actor.step()
        if self.engine.ema is not None:
            metrics["ema/decay"] = self.engine.ema.update()
        return {
            **metrics,
            "optim/actor_grad_norm": actor.grad_norm,
            "optim/actor_lr": actor.learning_rate,
        }

    def _check_finite(self, metrics: dict[str, float]) -> None:
        for key, value in metrics.items():
            require(
                math.isfinite(value),
                f"{key} became {value} in iteration {self.iteration}; lower the learning rates, "
                "or raise ppo.kl.coef, and start from the last export",
            )

    def state(self) -> State:
        """All that the next iteration depends on, and a rollout not yet learnt from; all ranks.

        Not `metrics` and `last_rollout`: both were logged and belong to the iteration before.
        """
        pending: State | None = None
        if self._pending is not None and self.last_rollout is not None:
            pending = rollout_state(self.last_rollout, self._pending)
            pending["metrics"] = self._rollout_metrics
        parts = {name: part.state() for name, part in self._parts().items()}
        return {
            **parts,
            "iteration": self.iteration,
            "kl_coef": self.kl_coef,
            "rollout": pending,
        }

    def load_state(self, state: State) -> None:
        """Go on from a state, of any number of ranks and ZeRO stage; all ranks must call it."""
        for name, part in self._parts().items():
            require(
                name in state, f"the checkpoint holds no {name}; resume with its run's settings"
            )
            part.load_state(state[name])
        self.iteration = state["iteration"]
        self.kl_coef = state["kl_coef"]
        self._pending, self._resumed = None, state["rollout"]

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "actor": self.engine.actor,
            "critic": self.engine.critic,
            "ema": self.engine.ema,
            "mixture": self.mixture,
            "phases": self.phases,
        }
        return {name: part for name, part in parts.items() if part is not None}
