"""Stage 3: proximal policy optimisation.

`generate_experience(prompts)` samples and scores, `step(experience)` learns, for as many epochs
and minibatches as the config says. Shapes: B batch, R response tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf_kit import distributed, fingerprint, memory_check
from rlhf_kit import functional as f
from rlhf_kit.config import GenerationConfig, RunConfig, require
from rlhf_kit.faults import Faults, RolledBack
from rlhf_kit.hybrid_engine.decode import NotFinite
from rlhf_kit.metrics import Phases
from rlhf_kit.micro_batches import MicroBatch, micro_batches
from rlhf_kit.mixture import MixtureLoss, probe_parameters
from rlhf_kit.monitor import ADVICE, Monitor
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.rollout import ask_models, make_experience, restored_rollout, rollout_state
from rlhf_kit.tokenization import Encoded
from rlhf_kit.training_state import State, Stateful
from rlhf_kit.types import Experience, PromptBatch, Rollout

Result = TypeVar("Result")
EMA_DISTANCE_EVERY = 10
"""Iterations between two measurements of the average's distance; the first is measured too."""


def _count(mask: Tensor) -> int:
    """Tokens under the masks of all ranks."""
    return int(distributed.all_sum(mask.sum()))


def _fingerprint(prompts: PromptBatch) -> int:
    """The number of the prompts and sampling seeds of all ranks."""
    rows = zip(prompts.seeds.tolist(), prompts.input_ids, prompts.attention_mask, strict=True)
    mine = fingerprint.of_batch([seed, *ids[mask].tolist()] for seed, ids, mask in rows)
    # A float would round what a 32-bit number says.
    total = distributed.all_sum(torch.tensor(mine, device=distributed.local_device()))
    return int(total) % fingerprint.BELOW


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
        faults: Faults | None = None,
    ):
        """`mixture_rows` are tokenized texts for the mixture loss; without any it is off.

        `faults` says what to do when something breaks; None takes the defaults.
        """
        self.engine = engine
        self.faults = faults or Faults(args.faults)
        # Many ranks may have less than a micro-batch of a minibatch each.
        ranks = distributed.world_size()
        self.micro_batch_size = min(args.ppo.micro_batch_size, args.ppo.minibatch_size // ranks)
        self.micro_batch_tokens = args.ppo.micro_batch_tokens
        self.monitor = Monitor(args, engine.tokenizer)
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
        self.faults.place = [
            (self, "iteration"),
            (engine.actor, "steps_done"),
            (engine.critic, "steps_done"),
            (self.mixture, "steps"),
        ]
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
        self.faults.step = self.iteration + 1
        with self.phases("generate") as phase:
            rollout = self._generate(prompts.to(self.engine.device))
            self.engine.actor.end_generation()
            phase.tokens += _count(rollout.response_mask)
        self.last_rollout = rollout
        temperature = self.generation.temperature
        with self.phases("score") as phase:
            opinions = self._within_memory(
                "scoring",
                lambda size: ask_models(
                    rollout, self.engine, self.config, temperature=temperature, size=size
                ),
            )
            experience, self._rollout_metrics = make_experience(
                rollout,
                self.engine,
                self.config,
                kl_coef=self.kl_coef,
                temperature=temperature,
                opinions=opinions,
            )
            self._rollout_metrics |= self._watch(rollout, experience)
            self._rollout_metrics["data/fingerprint"] = _fingerprint(prompts)
            phase.tokens += _count(experience.attention_mask)
        self._pending = experience
        return experience

    def _watch(self, rollout: Rollout, experience: Experience) -> dict[str, float]:
        """The monitor's metrics of a rollout, now and then by the held-out reward model too."""
        scorer = self.monitor.heldout
        if scorer is None or not self.monitor.due(self.iteration):
            return self.monitor.measure(rollout, experience.score)
        width = rollout.sequences.shape[1] if self.micro_batch_tokens else 1
        heldout = self._within_memory(
            "scoring", lambda size: scorer.normalised(rollout, max(size // width, 1))
        )
        return self.monitor.measure(rollout, experience.score, heldout)

    def _generate(self, prompts: PromptBatch) -> Rollout:
        """Responses of the actor as it is now; with fewer slots where memory runs out."""
        self.engine.rest()
        self.engine.actor.eval()

        def attempt(slots: int) -> Rollout | NotFinite:
            try:
                generation = dataclasses.replace(self.generation, slots=slots)
                return self.engine.actor.generate(prompts, generation)
            except NotFinite as error:
                return error

        found, slots = self.faults.within_memory(
            "generating",
            self.generation.slots,
            attempt,
            lower="generation.slots",
            whole=self.engine.actor.config.generation_tp == 1,
        )
        self.generation = dataclasses.replace(self.generation, slots=slots)
        if not distributed.all_any(isinstance(found, NotFinite), self.engine.device):
            assert isinstance(found, Rollout)
            return found
        # No update with such a gradient is applied: the weights themselves are out of range.
        with contextlib.suppress(RolledBack):
            policy = "stop" if self.faults.config.nonfinite == "stop" else "roll_back"
            self.faults.act(
                "nonfinite",
                policy,
                "the actor's logits are not finite",
                "lower ppo.actor_optimizer.learning_rate",
            )
        return self._generate(prompts)

    def _within_memory(self, doing: str, attempt: Callable[[int], Result]) -> Result:
        """`attempt(rows at once)`, or tokens at once; with half of them where memory runs out."""
        engines = (self.engine.actor, self.engine.critic)

        def undo() -> None:
            for engine in engines:
                engine.drop_gradients()

        by_tokens = self.micro_batch_tokens > 0
        counted = "micro_batch_tokens" if by_tokens else "micro_batch_size"
        result, size = self.faults.within_memory(
            doing,
            self.micro_batch,
            attempt,
            lower=f"ppo.{counted}",
            undo=undo,
            whole=all(engine.config.zero_stage < 3 for engine in engines),
            unit="token" if by_tokens else "row",
            smallest=self.args.data.max_length if by_tokens else 1,
        )
        setattr(self, counted, size)
        return result

    @property
    def micro_batch(self) -> int:
        """Tokens that pass through a model at once where the config counts them, else rows."""
        return self.micro_batch_tokens or self.micro_batch_size

    def micro_batches(self, minibatch: Experience, size: int) -> list[MicroBatch]:
        """As in scoring, so that old and new logprobs of a row come from equal passes."""
        return micro_batches(
            minibatch.sequences,
            minibatch.attention_mask,
            minibatch.response_mask.shape[1],
            size=size,
            by_tokens=self.micro_batch_tokens > 0,
        )

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """`step`, returning the actor's and the critic's mean loss as DeepSpeed Chat does."""
        metrics = self.step(experience)
        return metrics.get("policy/loss", 0.0), metrics.get("value/loss", math.nan)

    def step(self, experience: Experience) -> dict[str, float]:
        """All epochs and minibatches over one experience; returns the iteration's metrics."""
        self.faults.step = self.iteration + 1
        metrics = {**self._rollout_metrics, "objective/kl_coef": self.kl_coef}
        texts = self.mixture.steps if self.mixture is not None else 0
        with contextlib.suppress(RolledBack):
            with self.phases("train") as phase:
                metrics |= self._train(experience)
                phase.tokens += int(_count(experience.attention_mask) * metrics["ppo/epochs_done"])
            self.faults.check(metrics)
            if self.monitor.due(self.iteration):
                self.monitor.add(metrics)
                for name, what in self.monitor.signs().items():
                    policy = self.args.monitor.policy
                    said = f"a sign of reward hacking: {what}"
                    self.faults.act("reward_hacking", policy, said, ADVICE[name])
        self._steer_kl(metrics)
        if self.mixture is not None and "data/fingerprint" in metrics:
            mixed = self.mixture.fingerprint(range(texts, self.mixture.steps))
            total = int(metrics["data/fingerprint"]) + mixed
            metrics["data/fingerprint"] = total % fingerprint.BELOW
        self.iteration += 1
        self._pending = self._resumed = None
        measured = self.iteration == 1 or self.iteration % EMA_DISTANCE_EVERY == 0
        if self.engine.ema is not None and measured:
            metrics["ema/distance"] = self.engine.ema.distance()
        self.metrics = {**metrics, **self._speed()}
        if self.iteration == 1:
            self.metrics |= memory_check.compare(self.args, "ppo", self.phases)
        return self.metrics

    def _steer_kl(self, metrics: dict[str, float]) -> None:
        kl = metrics.get("objective/kl", math.nan)
        if self.config.kl.kind == "adaptive" and math.isfinite(kl):
            self.kl_coef = f.next_kl_coef(
                self.kl_coef,
                kl=kl,
                target=self.config.kl.target,
                horizon=self.config.kl.horizon,
                n=self.config.batch_size,
            )

    def _speed(self) -> dict[str, float]:
        lap = self.phases.lap()
        spent = sum(value for key, value in lap.items() if key.endswith("/seconds"))
        speed = {"perf/pairs_per_second": self.config.batch_size / max(spent, 1e-9)}
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
        epochs_done, skipped = 0.0, 0
        for epoch in range(self.config.epochs):
            order = self._order(len(experience), epoch).to(experience.sequences.device)
            for index in order.split(minibatch):
                metrics = self._minibatch(experience.rows(index), train_actor=train_actor)
                if metrics is None:
                    skipped += 1
                    continue
                for key, value in metrics.items():
                    history[key].append(value)
                epochs_done += len(index) / len(experience)
                if train_actor and self._diverged(metrics):
                    break
            else:
                continue
            break
        means = {key: sum(values) / len(values) for key, values in history.items()}
        means |= {"faults/skipped": float(skipped)} if skipped else {}
        return {**means, "ppo/epochs_done": epochs_done}

    def _order(self, rows: int, epoch: int) -> Tensor:
        """The order of this rank's rows in an epoch: as sampled in the first, a fresh one later.

        Prompts come in random order already, and the first epoch's micro-batches must be the
        ones that old logprobs were computed in. Later, of the places c, c + M, c + 2M ... of the
        global batch each minibatch of M rows takes one at random, for every c: an even share of
        every rank's rows (those of place modulo ranks), and the same rows on any number of them.
        """
        if epoch == 0:
            return torch.arange(rows)
        ranks, rank = distributed.world_size(), distributed.rank()
        size = min(self.config.minibatch_size, rows * ranks)
        seed = distributed.derive_seed("ppo", self.args.seed, self.iteration, epoch)
        chance = torch.Generator().manual_seed(seed)
        turns = torch.rand(size, rows * ranks // size, generator=chance).argsort(dim=1)
        places = torch.arange(size).unsqueeze(1) + size * turns  # [c, minibatch]
        return places[rank::ranks].T.flatten() // ranks

    def _diverged(self, metrics: dict[str, float]) -> bool:
        """Whether the approximate KL of this minibatch (of all ranks) is over the limit."""
        return 0 < self.config.max_approx_kl < metrics["policy/approx_kl"]

    def _minibatch(self, experience: Experience, *, train_actor: bool) -> dict[str, float] | None:
        """One optimiser step of actor and critic on the rows of one minibatch.

        None where it was left out, because something in it was not finite.
        """
        tokens = float(distributed.all_sum(experience.response_mask.sum().double()))
        mixture = self.mixture if train_actor else None
        text_tokens = mixture.tokens() if mixture is not None else 0.0
        if mixture is not None and mixture.due():
            probes = probe_parameters(self.engine.actor)
            gradients = self._within_memory(
                "training",
                lambda size: (
                    self._policy_gradient(experience, tokens, probes, size),
                    mixture.gradient(probes, text_tokens, size),
                ),
            )
            mixture.set_weight(*gradients)

        def attempt(size: int) -> dict[str, Tensor]:
            totals: dict[str, Tensor] = {}
            for micro in self.micro_batches(experience, size):
                parts = self._value_backward(experience, tokens, micro)
                if train_actor:
                    loss, metrics = self._policy(self.engine.actor, experience, tokens, micro)
                    self.faults.backward(self.engine.actor, loss)
                    parts |= {"policy/loss": loss.detach(), **metrics}
                for key, value in parts.items():
                    totals[key] = totals[key] + value.detach() if key in totals else value.detach()
            if mixture is not None:
                loss = mixture.backward(text_tokens, size, self.faults.backward)
                totals["mixture/loss"] = loss
            return totals

        totals = self._within_memory("training", attempt)
        summed = distributed.all_sum(torch.stack([v.double() for v in totals.values()]))
        metrics = dict(zip(totals, summed.tolist(), strict=True))
        if mixture is not None:
            mixture.steps += 1
            metrics["mixture/coef"] = mixture.weight
        if not self._step(metrics, train_actor=train_actor):
            return None
        if train_actor:
            mean = metrics["policy/ratio_mean"]
            metrics["policy/ratio_var"] = max(metrics.pop("policy/ratio_square") - mean**2, 0.0)
        return metrics

    def _step(self, metrics: dict[str, float], *, train_actor: bool) -> bool:
        """Both optimisers' steps and the average's, or none of them; adds what they say."""
        actor, critic = self.engine.actor, self.engine.critic
        if not self.faults.finite(metrics, [actor, critic] if train_actor else [critic]):
            return False
        info = critic.step()
        applied = info.applied
        metrics |= {
            "optim/critic_grad_norm": info.grad_norm,
            "optim/critic_lr": info.learning_rate,
        }
        if train_actor:
            info = actor.step()
            applied = applied and info.applied
            metrics |= {
                "optim/actor_grad_norm": info.grad_norm,
                "optim/actor_lr": info.learning_rate,
            }
            if self.engine.ema is not None and info.applied:
                metrics["ema/decay"] = self.engine.ema.update()
        if not applied:  # a sum over ranks too large, though its terms were finite
            self.faults.nonfinite("NaN or infinity in the gradient")
        return applied

    def _policy(
        self, actor: Any, minibatch: Experience, tokens: float, micro: MicroBatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss of a micro-batch, as its share of the minibatch's mean.

        `micro` is one of the minibatch's, None all of it.
        """
        micro = micro or self.micro_batches(minibatch, 0)[0]
        logprobs, entropy = self.engine.logprobs(
            actor, micro, self.generation.temperature, entropy=True
        )
        old_logprobs = micro.of(minibatch.old_logprobs)
        weights = None
        if self.config.old_logprobs == "corrected":
            # Truncated importance sampling: the engine sampled from rollout_logprobs.
            gap = old_logprobs - micro.of(minibatch.rollout_logprobs)
            weights = gap.exp().clamp(max=self.config.importance_cap)
        loss, metrics = f.policy_loss(
            logprobs,
            old_logprobs,
            micro.of(minibatch.advantages),
            torch.ones_like(logprobs, dtype=torch.bool),
            clip_ratio=self.config.clip_ratio,
            dual_clip=self.config.dual_clip,
            importance_weights=weights,
            denominator=tokens,
        )
        metrics["objective/entropy"] = entropy.sum() / tokens
        return loss, metrics

    def _value_backward(
        self, minibatch: Experience, tokens: float, micro: MicroBatch | None = None
    ) -> dict[str, Tensor]:
        micro = micro or self.micro_batches(minibatch, 0)[0]
        values = micro.before(self.engine.critic(micro.input_ids))
        loss, metrics = f.value_loss(
            values,
            micro.of(minibatch.values),
            micro.of(minibatch.returns),
            torch.ones_like(values, dtype=torch.bool),
            value_clip=self.config.value_clip,
            denominator=tokens,
        )
        self.faults.backward(self.engine.critic, loss)
        return {"value/loss": loss.detach(), **metrics}

    def _policy_gradient(
        self, experience: Experience, tokens: float, probes: Sequence[Tensor], size: int
    ) -> list[Tensor]:
        """This rank's part of the minibatch's policy gradient on `probes`, without stepping.

        On the bare module: DeepSpeed allows no second way to call backward through its engine.
        """
        total = [torch.zeros_like(p, dtype=torch.float32) for p in probes]
        for micro in self.micro_batches(experience, size):
            loss, _ = self._policy(self.engine.actor.module, experience, tokens, micro)
            for sum_, grad in zip(total, torch.autograd.grad(loss, probes), strict=True):
                sum_ += grad
        return total

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
            "micro_batch_size": self.micro_batch_size,
            "micro_batch_tokens": self.micro_batch_tokens,
            "slots": self.generation.slots,
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
        # Lowered since, by memory that ran out before a roll-back: it would run out again.
        self.micro_batch_size = min(self.micro_batch_size, state["micro_batch_size"])
        if tokens := state.get("micro_batch_tokens", 0):  # 0 or absent: rows were counted
            self.micro_batch_tokens = min(self.micro_batch_tokens, tokens)
        slots = min(self.generation.slots, state["slots"])
        self.generation = dataclasses.replace(self.generation, slots=slots)

    def _parts(self) -> dict[str, Stateful]:
        parts: dict[str, Stateful | None] = {
            "actor": self.engine.actor,
            "critic": self.engine.critic,
            "ema": self.engine.ema,
            "mixture": self.mixture,
            "monitor": self.monitor,
            "phases": self.phases,
            "faults": self.faults,
        }
        return {name: part for name, part in parts.items() if part is not None}
