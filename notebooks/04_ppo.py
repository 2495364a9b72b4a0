# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 PPO
#
# Goal: let the model try, score what it says, and make better answers
# likelier.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer or cluster
run_dir: str = "runs/notebooks"  # where models and metrics go
seed: int | None = None  # decides data order, sampling and initialisation
iterations: int | None = None  # rollout and update rounds
epochs: int | None = None  # passes over each rollout
kl_coef: float | None = None  # penalty a nat against the SFT model
kl_kind: str | None = None  # fixed or adaptive
actor_learning_rate: float | None = None  # peak learning rate of the actor
critic_learning_rate: float | None = None  # and of the critic
old_logprobs: str | None = None  # recompute, rollout or corrected
mixture: str | None = None  # none, coef or grad_norm_ratio
ptx_coef: float | None = None  # weight of the mixture loss with coef
ema_decay: float | None = None  # of the average of the actor's weights
zero_stage: int | None = None  # ZeRO stage of the actor, 0 to 3
lora_rank: int | None = None  # adapters of this rank; 0 trains all weights

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
from rlhf_kit import (
    DeepSpeedPPOTrainer,
    DeepSpeedRLHFEngine,
    distributed,
    invariants,
)
from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import export
from rlhf_kit.hybrid_engine.training import start_deepspeed
from rlhf_kit.metrics import MetricsLog, read_metrics
from rlhf_kit.models import resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.rollout import PromptLoader, write_samples
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    as_text,
    encode_demonstrations,
    keep_fitting,
    load_tokenizer,
    prepare_tokenizer,
)
from tqdm.auto import tqdm

start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    ppo__iterations=iterations,
    ppo__epochs=epochs,
    ppo__kl__coef=kl_coef,
    ppo__kl__kind=kl_kind,
    ppo__actor_optimizer__learning_rate=actor_learning_rate,
    ppo__critic_optimizer__learning_rate=critic_learning_rate,
    ppo__old_logprobs=old_logprobs,
    ppo__mixture__kind=mixture,
    ppo__mixture__ptx_coef=ptx_coef,
    ppo__ema__decay=ema_decay,
    actor_engine__zero_stage=zero_stage,
    actor_engine__lora__rank=lora_rank,
)
args = run.args()
distributed.seed_everything(args.seed)

# %% [markdown]
# ## Prompts, and text for the mixture loss

# %%
tokenizer = load_tokenizer(resolve_model(args.actor_model))
prepare_tokenizer(tokenizer)
blend = Blend(args.data, args.seed)
prompts = keep_fitting(tokenizer, blend["ppo"], args.data)
texts = encode_demonstrations(tokenizer, blend["sft"], args.data)
num_total_iters = args.ppo.iterations
prompt_train_dataloader = PromptLoader(
    tokenizer,
    prompts.rows,
    batch_size=args.ppo.batch_size,
    iterations=num_total_iters,
    seed=args.seed,
)

# %% [markdown]
# ## Train

# %%
engine = DeepSpeedRLHFEngine(
    actor_model_name_or_path=args.actor_model_name_or_path,
    critic_model_name_or_path=args.critic_model_name_or_path,
    tokenizer=tokenizer,
    num_total_iters=num_total_iters,
    args=args,
)
trainer = DeepSpeedPPOTrainer(
    engine=engine, args=args, mixture_rows=as_text(texts.rows)
)

# %%
log = MetricsLog(
    run.stage("ppo"), console=["objective/score", "objective/kl"], purge_step=0
)
samples = run.stage("ppo") / "samples.jsonl"
for prompt_batch in tqdm(prompt_train_dataloader, disable=None):
    out = trainer.generate_experience(prompt_batch)
    if trainer.iteration == 0:
        invariants.report(invariants.check_first_batch(trainer, out))
    actor_loss, critic_loss = trainer.train_rlhf(out)
    if trainer.iteration == 1:
        invariants.report(invariants.check_after_first_step(trainer))
    log(trainer.iteration, trainer.metrics)
    write_samples(
        samples, trainer.iteration, trainer.last_rollout, out, tokenizer
    )
log.close()

# %%
export(engine.actor.module, tokenizer, run.path / "ppo" / "final")
if engine.ema is not None:
    with engine.ema.swapped_in():
        export(engine.actor.module, tokenizer, run.path / "ppo" / "ema")
run.finish("ppo", trainer.phases, iterations=trainer.iteration)

# %%
history = read_metrics(run.path / "ppo")
figure = plot_curves(
    history,
    {
        "score": ["objective/score"],
        "KL to the SFT model, nats a response": ["objective/kl"],
    },
)
