"""Every setting of a run, as small frozen dataclasses, and the presets.

A preset is a function that returns a complete `RunConfig`; `override` changes single fields by
dotted name and refuses names and types it does not know. Nothing is derived silently: batch
arithmetic that does not come out even is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_kit.recipes import RECIPES


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) for the user unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def printable(name: str) -> str:
    """A name that a user gave, for a message of one line."""
    return name if name.isprintable() else repr(name)


def exact_div(a: int, b: int, what: str) -> int:
    """a / b, refusing a remainder; `what` names the two settings for the message."""
    require(b > 0 and a % b == 0, f"{what}: {a} is not a multiple of {b}; change one of them")
    return a // b


@dataclass(frozen=True)
class GenerationConfig:
    """How responses are sampled."""

    max_new_tokens: int = 256
    """Longest response, in tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 means greedy."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 means all."""
    top_p: float = 1.0
    """Sample from the smallest set with this probability; 1 means all."""
    min_new_tokens: int = 0
    """No EOS before this many tokens; 0 allows an empty response."""
    slots: int = 64
    """Rows decoded at once; a finished row's slot is refilled."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens must be at least 1")
        require(self.temperature >= 0, "temperature must be 0 (greedy) or more")
        require(self.top_k >= 0, "top_k must be 0 (off) or more")
        require(0 < self.top_p <= 1, "top_p must be above 0 and at most 1")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens must lie between 0 and max_new_tokens",
        )
        require(self.slots > 0, "slots must be at least 1")


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters through peft (Hu et al. 2021); scaling is alpha / rank."""

    rank: int = 0
    """Rank of the adapters; 0 trains all weights."""
    alpha: int = 32
    """Scale of the adapters, before division by the rank."""
    dropout: float = 0.0
    """Must be 0 in PPO, where every forward has to agree."""
    target_modules: str = "all-linear"
    """Which layers get adapters, as peft names them (comma-separated names also work)."""
    merge: bool = True
    """Generate from a copy of the weights with the adapters added: faster, for a second copy of
    the adapted weights while generating."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora rank must be 0 (off) or more")
        require(self.alpha > 0, "lora alpha must be positive")
        require(0 <= self.dropout < 1, "lora dropout must lie in [0, 1)")


@dataclass(frozen=True)
class EngineConfig:
    """How DeepSpeed holds one trained model."""

    zero_stage: int = 0
    """0 replicates all; 1 shards optimiser states, 2 also gradients, 3 also parameters.
    With bf16, 0 does what 1 does."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of weights and activations; the optimiser keeps fp32 master weights."""
    offload_optimizer: bool = False
    """Keep optimiser states in CPU memory (ZeRO 1-3)."""
    offload_parameters: bool = False
    """Keep idle parameters in CPU memory (ZeRO 3)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Adapters instead of all weights."""
    cuda_graphs: bool = True
    """On a GPU, compile the actor's layers for generation and replay each step as a CUDA graph."""
    keep_cache: bool = False
    """Keep what generation holds (KV cache, captured steps, parts of weights) while training: saves
    making it again in every iteration, and takes the memory."""
    generation_tp: int = 1
    """Ranks of a host that generate together, each with a part of every weight (tensor
    parallelism); 1 generates alone. With ZeRO-3 no rank then ever holds the whole actor."""

    def __post_init__(self) -> None:
        require(self.generation_tp >= 1, "generation_tp must be at least 1")
        require(self.zero_stage in (0, 1, 2, 3), "zero_stage must be 0, 1, 2 or 3")
        require(self.dtype in ("fp32", "bf16"), "dtype must be fp32 or bf16")
        require(
            not self.offload_optimizer or self.zero_stage >= 1,
            "offload_optimizer needs zero_stage 1 or more",
        )
        require(
            not self.offload_parameters or self.zero_stage == 3,
            "offload_parameters needs zero_stage 3",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, linear warm-up, then a schedule down to `final_ratio` of the peak."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the gradient's mean."""
    beta2: float = 0.95
    """Decay of the gradient's square."""
    eps: float = 1e-8
    """Added to the denominator, after bias correction."""
    weight_decay: float = 0.0
    """On matrices only; biases and norms never decay."""
    warmup_ratio: float = 0.0
    """Share of all steps in which the rate rises from 0."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay after the warm-up."""
    final_ratio: float = 0.0
    """The last step's rate as a share of the peak."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "learning_rate must be positive")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio must lie in [0, 1)")
        require(0 <= self.final_ratio <= 1, "final_ratio must lie in [0, 1]")
        require(
            self.schedule in ("cosine", "linear", "constant"),
            "schedule must be cosine, linear or constant",
        )
        require(self.max_grad_norm > 0, "max_grad_norm must be positive")


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of the blend."""

    name: str
    """`toy_world`, a local file or directory, or the name of a dataset on the hub."""
    weight: float = 1.0
    """Share of the blend, relative to the other sources' weights."""
    max_rows: int | None = None
    """Take at most this many rows of a stage; None takes all."""
    repeat: int = 1
    """How often its rows may come, so that it keeps its share beside a larger source."""

    def __post_init__(self) -> None:
        require(bool(self.name), "a data source needs a name")
        require(self.weight > 0, f"the weight of data source {self.name} must be positive")
        require(
            self.max_rows is None or self.max_rows > 0,
            f"max_rows of data source {self.name} must be positive",
        )
        require(self.repeat > 0, f"repeat of data source {self.name} must be at least 1")


@dataclass(frozen=True)
class DataConfig:
    """Which rows are seen, and how long they may be."""

    sources: tuple[SourceConfig, ...] = (SourceConfig("toy_world"),)
    """The blend."""
    split: tuple[float, float, float] = (2.0, 4.0, 4.0)
    """Shares of the disjoint splits for sft, reward and ppo, cut by the prompt's content hash."""
    eval_share: float = 0.05
    """Share of each split held out for evaluation."""
    max_prompt_length: int = 256
    """Longer prompts are dropped and counted, never cut."""
    max_length: int = 512
    """Prompt and response together; longer responses are cut and keep their EOS."""
    rows: tuple[int, int, int] = (0, 0, 0)
    """At most this many training rows for sft, reward, ppo; 0 takes all there are."""
    temperature: float = 1.0
    """The sources' weights are raised to 1 / this: above 1 evens the shares out."""
    cache: str = ""
    """A directory that keeps encoded rows from run to run, for data that takes long to encode."""

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "name at least one data source")
        require(
            len(self.split) == 3 and min(self.split) >= 0 and sum(self.split) > 0,
            "split needs three shares, none negative, for sft, reward and ppo",
        )
        require(0 <= self.eval_share < 1, "eval_share must lie in [0, 1)")
        require(
            0 < self.max_prompt_length < self.max_length,
            "max_prompt_length must be positive and below max_length",
        )
        require(
            len(self.rows) == 3 and min(self.rows) >= 0,
            "rows needs three counts, none negative, for sft, reward and ppo",
        )
        require(self.temperature > 0, "the temperature of the blend must be positive")


@dataclass(frozen=True)
class SFTConfig:
    """Stage 1: supervised fine-tuning on demonstrations."""

    epochs: int = 1
    """Passes over the demonstrations."""
    batch_size: int = 64
    """Rows an optimiser step, over all ranks."""
    micro_batch_size: int = 64
    """Rows a forward pass, on one rank."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and schedule."""

    def __post_init__(self) -> None:
        require(
            min(self.epochs, self.batch_size, self.micro_batch_size) > 0,
            "sft epochs and batch sizes must be positive",
        )


@dataclass(frozen=True)
class RewardConfig:
    """Stage 2: the reward model, on preference pairs."""

    epochs: int = 1
    """Passes over the pairs; more than one overfits (InstructGPT, appendix C.2)."""
    batch_size: int = 64
    """Pairs an optimiser step, over all ranks."""
    micro_batch_size: int = 64
    """Pairs a forward pass, on one rank."""
    init_from: Literal["sft", "base"] = "sft"
    """Start from the SFT model (InstructGPT) or from the reward_model of the run config."""
    center_coef: float = 0.01
    """Weight of the mean squared score sum, which keeps scores near zero while training."""
    margin: float = 0.0
    """Subtracted from the score difference inside the sigmoid."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser and schedule."""

    def __post_init__(self) -> None:
        require(
            min(self.epochs, self.batch_size, self.micro_batch_size) > 0,
            "reward epochs and batch sizes must be positive",
        )
        require(self.init_from in ("sft", "base"), "init_from must be sft or base")
        require(self.center_coef >= 0, "center_coef must be 0 or more")


@dataclass(frozen=True)
class KLConfig:
    """The KL penalty against the frozen SFT model."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    """Adaptive: a log-space proportional controller (Ziegler et al. 2019, section 2.2)."""
    coef: float = 0.05
    """Penalty per nat; with an adaptive controller, the first value."""
    target: float = 6.0
    """Adaptive only: nats a response to steer to."""
    horizon: int = 10000
    """Adaptive only: rollouts over which the controller reacts."""

    def __post_init__(self) -> None:
        require(self.kind in ("fixed", "adaptive"), "kl kind must be fixed or adaptive")
        require(self.coef >= 0, "kl coef must be 0 or more")
        require(self.target > 0 and self.horizon > 0, "kl target and horizon must be positive")


@dataclass(frozen=True)
class MixtureConfig:
    """The pretraining objective mixed into PPO (InstructGPT's PPO-ptx)."""

    kind: Literal["none", "coef", "grad_norm_ratio"] = "grad_norm_ratio"
    """`coef` weighs the loss by a constant; the ratio makes it a share of PPO's gradient."""
    ptx_coef: float = 27.8
    """With kind `coef`: the constant (InstructGPT, appendix C.4)."""
    ratio: float = 0.1
    """With kind `grad_norm_ratio`: norm of the mixture gradient over norm of the PPO gradient."""
    batch_ratio: float = 1.0
    """Mixture rows for each PPO row of a minibatch (InstructGPT: 8)."""

    def __post_init__(self) -> None:
        require(
            self.kind in ("none", "coef", "grad_norm_ratio"),
            "mixture kind must be none, coef or grad_norm_ratio",
        )
        require(self.ptx_coef >= 0 and self.ratio >= 0, "mixture weights must be 0 or more")
        require(self.batch_ratio > 0, "mixture batch_ratio must be positive")


@dataclass(frozen=True)
class EMAConfig:
    """The exponential moving average of the actor, in fp32, once an optimiser step."""

    enabled: bool = True
    """Keep an average and export it beside the final weights."""
    decay: float = 0.992
    """Weight of the old average (InstructGPT, appendix C.4)."""
    warmup: bool = True
    """Use min(decay, (1 + n) / (10 + n)) at update n, so that the first steps are not stuck."""

    def __post_init__(self) -> None:
        require(0 <= self.decay < 1, "ema decay must lie in [0, 1)")


@dataclass(frozen=True)
class PPOConfig:
    """Stage 3: proximal policy optimisation against the reward model."""

    iterations: int = 60
    """Rollout and update rounds."""
    batch_size: int = 64
    """Prompts an iteration, over all ranks."""
    epochs: int = 1
    """Passes over each rollout, each in a fresh order."""
    minibatch_size: int = 32
    """Rows an optimiser step, over all ranks."""
    micro_batch_size: int = 32
    """Rows a forward pass, on one rank."""
    micro_batch_tokens: int = 0
    """Tokens a forward pass, on one rank, padding counted: rows of a minibatch that are of similar
    length go together. 0 goes by `micro_batch_size`."""
    actor_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(eps=1e-5, schedule="linear")
    )
    """Optimiser of the actor."""
    critic_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(eps=1e-5, schedule="linear")
    )
    """Optimiser of the critic."""
    critic_warmup_iterations: int = 0
    """First iterations in which the critic alone learns (Secrets of RLHF; VC-PPO)."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty against the SFT model."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """GAE's lambda."""
    clip_ratio: float = 0.2
    """The ratio is clipped to 1 +- this."""
    dual_clip: float = 0.0
    """For negative advantages the loss is bounded by this times -A; 0 is off, usual is 3."""
    value_clip: float = 0.2
    """Values move at most this far from the old ones in the clipped value loss."""
    normalize_score: bool = True
    """Subtract the reward model's saved mean and divide by its saved standard deviation."""
    score_clip: float = 5.0
    """Normalised scores are clipped to +- this."""
    missing_eos_score: float | None = -1.0
    """A response without EOS scores at most this; None leaves it alone."""
    whiten_advantages: bool = True
    """Mean 0, standard deviation 1 over all response tokens of all ranks."""
    old_logprobs: Literal["recompute", "rollout", "corrected"] = "recompute"
    """`recompute` by a training forward; `rollout` takes the engine's; `corrected` recomputes and
    weights tokens by min(exp(old - rollout), importance_cap)."""
    importance_cap: float = 2.0
    """Bound of the importance weight of `corrected`."""
    max_approx_kl: float = 0.1
    """Leave the epochs of an iteration early beyond this approximate KL; 0 never leaves."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """The mixture loss."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The average of the actor."""

    @property
    def mixture_rows(self) -> int:
        """Mixture rows of a minibatch, over all ranks."""
        return max(int(self.minibatch_size * self.mixture.batch_ratio), 1)

    def check_ranks(self, ranks: int) -> None:
        """ValueError where so many ranks can't share a minibatch evenly."""
        exact_div(self.minibatch_size, ranks, "ppo.minibatch_size / ranks")
        if self.mixture.kind != "none":
            exact_div(self.mixture_rows, ranks, "mixture rows a minibatch / ranks")

    def __post_init__(self) -> None:
        require(self.iterations > 0 and self.epochs > 0, "iterations and epochs must be positive")
        require(
            min(self.batch_size, self.minibatch_size, self.micro_batch_size) > 0,
            "ppo batch sizes must be positive",
        )
        require(self.micro_batch_tokens >= 0, "ppo.micro_batch_tokens must be 0 (off) or more")
        require(
            0 <= self.critic_warmup_iterations < self.iterations,
            f"ppo.critic_warmup_iterations is {self.critic_warmup_iterations} of {self.iterations} "
            "iterations, so the actor would never learn; lower it",
        )
        require(self.score_clip > 0, "score_clip must be positive")
        require(self.importance_cap > 0, "importance_cap must be positive")
        require(0 < self.gamma <= 1 and 0 <= self.lam <= 1, "gamma and lam must lie in [0, 1]")
        require(self.clip_ratio > 0 and self.value_clip > 0, "clip ranges must be positive")
        require(self.dual_clip == 0 or self.dual_clip > 1, "dual_clip must be 0 (off) or above 1")
        require(
            self.old_logprobs in ("recompute", "rollout", "corrected"),
            "old_logprobs must be recompute, rollout or corrected",
        )
        exact_div(self.batch_size, self.minibatch_size, "ppo.batch_size / ppo.minibatch_size")


@dataclass(frozen=True)
class EvalConfig:
    """The report card."""

    prompts: int = 512
    """Held-out prompts for every model."""
    bootstrap: int = 1000
    """Resamples for a 95 % interval."""
    samples: int = 6
    """Dialogues shown side by side."""

    def __post_init__(self) -> None:
        require(min(self.prompts, self.bootstrap, self.samples) > 0, "eval sizes must be positive")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state of training is written, so that a killed run can go on."""

    every_steps: int = 0
    """Optimiser steps (in PPO: iterations) from one to the next; 0 goes by the clock alone."""
    every_minutes: float = 10.0
    """Minutes from one to the next; 0 goes by steps alone."""
    keep_last: int = 2
    """The newest ones that are kept; at least 1."""
    keep_best: bool = True
    """Keep the one with the best metric of the stage as well."""
    export_every: int = 0
    """PPO: iterations between two exports of the actor, for the app; 0 exports at the end only."""

    def __post_init__(self) -> None:
        require(
            self.every_steps >= 0 and self.every_minutes >= 0 and self.export_every >= 0,
            "checkpoint intervals must be 0 (off) or more",
        )
        require(self.keep_last >= 1, "checkpoint.keep_last must be at least 1")


@dataclass(frozen=True)
class LimitConfig:
    """A metric that must not stay outside [low, high]; None leaves an end open."""

    policy: Literal["off", "warn", "roll_back", "stop"] = "warn"
    """What follows; `roll_back` loads the last checkpoint and goes on with new prompts."""
    low: float | None = None
    """Smallest healthy value."""
    high: float | None = None
    """Largest healthy value."""

    def __post_init__(self) -> None:
        require(
            self.low is None or self.high is None or self.low <= self.high,
            f"a limit's low, {self.low}, must not be above its high, {self.high}",
        )


@dataclass(frozen=True)
class FaultConfig:
    """What to do about faults while training; docs/faults.md explains each."""

    nonfinite: Literal["skip", "roll_back", "stop"] = "skip"
    """NaN or infinity: leave the minibatch out, go back to the last checkpoint, or stop."""
    nonfinite_in_a_row: int = 4
    """After more minibatches left out in a row than this: roll back."""
    roll_backs: int = 1
    """Times a stage may go back to a checkpoint; after that it stops."""
    out_of_memory: Literal["halve", "stop"] = "halve"
    """Repeat with half the slots or half the micro-batch, down to one row; or stop."""
    window: int = 5
    """Iterations in a row that a metric has to be outside its limits."""
    kl: LimitConfig = LimitConfig("roll_back", high=100.0)
    """objective/kl, nats a response."""
    ratio: LimitConfig = LimitConfig("roll_back", low=0.5, high=2.0)
    """policy/ratio_mean."""
    entropy: LimitConfig = LimitConfig("warn", low=0.02)
    """objective/entropy, nats a token."""
    length: LimitConfig = LimitConfig("warn", low=2.0)
    """response/length, tokens, the EOS included."""
    truncated: LimitConfig = LimitConfig("warn", high=0.9)
    """response/truncated_rate, the share of responses that run into max_new_tokens."""
    empty: LimitConfig = LimitConfig("roll_back", high=0.5)
    """response/empty_rate, the share of responses without a token before their EOS."""
    score_spread: LimitConfig = LimitConfig("warn", low=1e-4)
    """objective/score_std: where all scores are equal there is nothing to learn."""
    distinct: LimitConfig = LimitConfig("warn", low=0.2)
    """response/distinct_rate, the share of different responses among a batch's."""

    def __post_init__(self) -> None:
        require(
            self.nonfinite in ("skip", "roll_back", "stop"),
            "faults.nonfinite must be skip, roll_back or stop",
        )
        require(
            self.nonfinite_in_a_row >= 0 and self.roll_backs >= 0,
            "faults.nonfinite_in_a_row and faults.roll_backs must be 0 or more",
        )
        require(self.window >= 1, "faults.window must be at least 1")


@dataclass(frozen=True)
class MonitorConfig:
    """Watches whether PPO learns to please the reward model rather than to answer well."""

    reward_model: str | None = None
    """Directory of a held-out reward model, that PPO never sees; None does without."""
    every: int = 2
    """Iterations between two scorings of the rollout by the held-out reward model."""
    window: int = 10
    """Measurements that are compared, the later half with the earlier one; even."""
    noise: float = 3.0
    """Standard errors by which the halves must differ to count as risen or fallen."""
    correlation: float = 0.5
    """A correlation of score and length, or score and repetition, that climbs above this warns."""
    policy: Literal["off", "warn", "roll_back", "stop"] = "warn"
    """What follows a warning."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "monitor.every must be at least 1")
        require(
            self.window >= 4 and self.window % 2 == 0,
            "monitor.window must be an even number, at least 4",
        )
        require(
            self.noise > 0 and 0 < self.correlation <= 1,
            "monitor.noise must be positive and monitor.correlation lie in (0, 1]",
        )


@dataclass(frozen=True)
class MemoryConfig:
    """What is held in memory, and where."""

    shared_base: bool = False
    """PPO's actor, critic and reward model are adapters on one frozen base, whose output without
    any is the ref's. The reward model must have been trained as an adapter of the actor's start."""
    offload_idle: bool = False
    """Keep what a phase of PPO does not need in pinned CPU memory meanwhile: ref and reward model
    until they score, the critic while responses are generated, optimisers' states and the average
    until training. Costs the copies."""
    logprob_chunk: int = 1024
    """Tokens whose logits exist at a time, in fp32, where logprobs are computed."""

    def __post_init__(self) -> None:
        require(self.logprob_chunk > 0, "memory.logprob_chunk must be at least 1")

    def check(self, actor: EngineConfig, critic: EngineConfig) -> None:
        """ValueError where these engines can't be held as this says."""
        if not self.shared_base:
            return
        require(
            actor.lora.rank > 0 and critic.lora.rank > 0,
            "memory.shared_base needs adapters: set actor_engine.lora.rank and "
            "critic_engine.lora.rank",
        )
        require(
            max(actor.zero_stage, critic.zero_stage) < 3,
            "memory.shared_base does not go with ZeRO-3, which cuts one engine's weights into "
            "shards that the others could not read; set zero_stage to 2 at most",
        )
        require(
            actor.dtype == critic.dtype,
            f"memory.shared_base needs one dtype, and actor_engine has {actor.dtype}, "
            f"critic_engine {critic.dtype}",
        )


@dataclass(frozen=True)
class RunConfig:
    """One whole run: data, three stages, evaluation."""

    preset: str
    """The preset it started from."""
    actor_model: str
    """Hub name or local directory of the base model."""
    reward_model: str
    """The reward model's base; only read where reward.init_from is `base`."""
    seed: int = 1
    """Decides data order, sampling and initialisation on every rank."""
    data: DataConfig = field(default_factory=DataConfig)
    """Rows and lengths."""
    actor_engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed settings of the actor, in SFT and PPO."""
    critic_engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed settings of the reward model and the critic."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    """Sampling of rollouts."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Stage 1."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Stage 2."""
    ppo: PPOConfig = field(default_factory=PPOConfig)
    """Stage 3."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """The report card."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Resuming."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """What to do when something breaks."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Reward hacking."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    """What lies where."""

    def __post_init__(self) -> None:
        require(bool(self.actor_model), "actor_model must name a model")
        self.memory.check(self.actor_engine, self.critic_engine)
        require(
            self.critic_engine.generation_tp == 1,
            "critic_engine.generation_tp must be 1: only the actor generates; set "
            "actor_engine.generation_tp",
        )
        require(
            self.data.max_prompt_length + self.generation.max_new_tokens <= self.data.max_length,
            "data.max_prompt_length + generation.max_new_tokens must not exceed data.max_length",
        )
        require(
            self.generation.temperature > 0,
            "generation.temperature must be positive in a run: PPO learns from sampled responses",
        )
        require(
            self.generation.top_k == 0
            and self.generation.top_p == 1
            and self.generation.min_new_tokens == 0,
            "generation.top_k, top_p and min_new_tokens must be off in a run: the logprobs PPO "
            "trains on would not be those that were sampled from",
        )

    @property
    def actor_model_name_or_path(self) -> str:
        """`actor_model`, by the name that DeepSpeed Chat's API gives it."""
        return self.actor_model

    @property
    def critic_model_name_or_path(self) -> str:
        """`reward_model`, by the name that DeepSpeed Chat's API gives it."""
        return self.reward_model

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, for run.json."""
        return dataclasses.asdict(self)


def _convert(value: Any, annotation: Any, name: str) -> Any:
    """`value` as the annotated type; ints become floats, nothing else is guessed."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), name)
    if origin is Literal:
        require(value in args, f"{name} must be one of {', '.join(map(str, args))}, not {value!r}")
        return value
    if origin is tuple:
        require(isinstance(value, list | tuple), f"{name} must be a list, not {value!r}")
        item = args[0]
        return tuple(_convert(v, item, f"{name}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(annotation):
        if type(value) is annotation:
            return value
        require(isinstance(value, Mapping), f"{name} must be a mapping, not {value!r}")
        return _build(annotation, value, name)
    if annotation is float and type(value) in (int, float):
        require(abs(value) < 1e300, f"{name} must be a finite number, not {_short(value)}")
        return float(value)
    require(
        isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)),
        f"{name} must be of type {getattr(annotation, '__name__', annotation)}, not {value!r}",
    )
    if type(value) is int:
        require(abs(value) < 1 << 63, f"{name} must have less than 64 bits, not {_short(value)}")
    return value


def _short(number: float) -> str:
    """Of an integer of any length: Python refuses to print more than 4,300 digits."""
    bits = number.bit_length() if isinstance(number, int) else 0
    return f"an integer of {bits} bits" if bits > 1000 else repr(number)


def _build(cls: Any, values: Mapping[str, Any], name: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = sorted(printable(str(key)) for key in values if key not in hints)
    require(not unknown, f"unknown setting {name + '.' if name else ''}{', '.join(unknown)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory]
    missing = [key for key in needed if key not in values]
    require(not missing, f"{name or 'the configuration'} lacks {', '.join(missing)}")
    return cls(
        **{k: _convert(v, hints[k], f"{name}.{k}" if name else k) for k, v in values.items()}
    )


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The inverse of `RunConfig.to_dict`; ValueError names an unknown key or a wrong type."""
    require(isinstance(values, Mapping), "a configuration must be a mapping of settings")
    return _build(RunConfig, values, "")


def override(config: RunConfig, **changes: Any) -> RunConfig:
    """A config with single fields changed; a dot in a name is written `__` (`ppo__kl__coef=0.1`).

    None means 'as it is', so that a notebook's untouched parameters change nothing. All changes
    apply before validation, so their order never matters.
    """
    values = config.to_dict()
    for name, value in changes.items():
        if value is None:
            continue
        *path, leaf = name.split("__")
        node = values
        for key in path:
            require(
                isinstance(node.get(key), dict),
                f"unknown setting {printable(name).replace('__', '.')}",
            )
            node = node[key]
        require(leaf in node, f"unknown setting {printable(name).replace('__', '.')}")
        node[leaf] = value
    return from_dict(values)


def toy() -> RunConfig:
    """The embedded toy world: the whole pipeline on two CPU cores in minutes."""
    return RunConfig(
        preset="toy",
        actor_model="toy_world",
        reward_model="toy_world",
        data=DataConfig(max_prompt_length=96, max_length=160, rows=(6000, 8000, 3840)),
        generation=GenerationConfig(max_new_tokens=44),
        sft=SFTConfig(optimizer=OptimizerConfig(learning_rate=1e-3)),
        reward=RewardConfig(optimizer=OptimizerConfig(learning_rate=1e-3)),
        ppo=PPOConfig(
            iterations=60,
            critic_warmup_iterations=5,
            kl=KLConfig(coef=0.1),
            mixture=MixtureConfig(batch_ratio=0.25),
            actor_optimizer=OptimizerConfig(
                learning_rate=6e-4,
                eps=1e-5,
                schedule="linear",
                warmup_ratio=0.08,
                final_ratio=0.1,
            ),
            critic_optimizer=OptimizerConfig(
                learning_rate=5e-4,
                eps=1e-5,
                schedule="linear",
                warmup_ratio=0.08,
                final_ratio=0.1,
            ),
            ema=EMAConfig(decay=0.95),
        ),
        checkpoint=CheckpointConfig(every_steps=20, every_minutes=0, export_every=20),
    )


def consumer() -> RunConfig:
    """One consumer GPU of 24 GB: Qwen2.5-0.5B on HH-RLHF, bf16, ZeRO-2, full fine-tuning."""
    engine = EngineConfig(zero_stage=2, dtype="bf16", gradient_checkpointing=True)
    return RunConfig(
        preset="consumer",
        actor_model="Qwen/Qwen2.5-0.5B",
        reward_model="Qwen/Qwen2.5-0.5B",
        data=DataConfig(sources=(SourceConfig("Anthropic/hh-rlhf"),)),
        actor_engine=engine,
        critic_engine=engine,
        sft=SFTConfig(micro_batch_size=8, optimizer=OptimizerConfig(learning_rate=1e-5)),
        reward=RewardConfig(micro_batch_size=8, optimizer=OptimizerConfig(learning_rate=9e-6)),
        ppo=PPOConfig(
            iterations=500,
            batch_size=128,
            minibatch_size=64,
            micro_batch_size=8,
            actor_optimizer=OptimizerConfig(learning_rate=1e-6, eps=1e-5, schedule="linear"),
            critic_optimizer=OptimizerConfig(learning_rate=5e-6, eps=1e-5, schedule="linear"),
            critic_warmup_iterations=10,
        ),
        # Without these PPO's optimiser steps do not fit beside all that is not needed just then.
        memory=MemoryConfig(offload_idle=True, logprob_chunk=256),
    )


def cluster() -> RunConfig:
    """Many GPUs: OPT-13B actor and OPT-350M reward model, ZeRO-3, as in the announcement."""
    base = consumer()
    return dataclasses.replace(
        base,
        preset="cluster",
        actor_model="facebook/opt-13b",
        reward_model="facebook/opt-350m",
        actor_engine=EngineConfig(zero_stage=3, dtype="bf16", gradient_checkpointing=True),
        critic_engine=EngineConfig(zero_stage=2, dtype="bf16"),
        memory=MemoryConfig(),
        reward=dataclasses.replace(base.reward, init_from="base"),
        ppo=dataclasses.replace(
            base.ppo,
            batch_size=1024,
            minibatch_size=512,
            # grad_norm_ratio needs whole gradients, which ZeRO-3 never has.
            mixture=MixtureConfig(kind="none"),
        ),
    )


def recipe(name: str) -> RunConfig:
    """One of `recipes.RECIPES`, complete."""
    base, changes = RECIPES[name]
    return override(PRESETS[base](), preset=name, **changes)


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "toy": toy,
    "consumer": consumer,
    "cluster": cluster,
    **{name: functools.partial(recipe, name) for name in RECIPES},
}


def preset(name: str, **changes: Any) -> RunConfig:
    """The preset of this name with `override`'s changes; ValueError lists the names there are."""
    require(name in PRESETS, f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
    return override(PRESETS[name](), **changes)
