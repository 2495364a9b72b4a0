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
# # 03 Reward model
#
# Goal: learn what people prefer, as one number a response.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer or cluster
run_dir: str = "runs/notebooks"  # where models and metrics go
seed: int | None = None  # decides data order and initialisation
epochs: int | None = None  # passes over the pairs
rows: int | None = None  # use at most this many pairs
learning_rate: float | None = None  # peak learning rate
init_from: str | None = None  # sft, or base for reward_model's own weights
reward_model: str | None = None  # the base to start from with init_from base
zero_stage: int | None = None  # ZeRO stage, 0 to 3

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
from rlhf_kit import distributed
from rlhf_kit.blending import Blend
from rlhf_kit.checkpoint import export
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.metrics import MetricsLog, Phases, read_metrics
from rlhf_kit.models import (
    ValueModel,
    add_lora,
    load_scorer,
    resolve_model,
    save_normalisation,
)
from rlhf_kit.plots import plot_curves
from rlhf_kit.reward import RewardTrainer, prompt_batches
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.tokenization import (
    encode_demonstrations,
    encode_pairs,
    load_tokenizer,
    prepare_tokenizer,
)
from tqdm.auto import tqdm

start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    reward__epochs=epochs,
    reward__init_from=init_from,
    reward__optimizer__learning_rate=learning_rate,
    reward_model=reward_model,
    critic_engine__zero_stage=zero_stage,
)
config = run.config
distributed.seed_everything(config.seed)

# %% [markdown]
# ## The pairs

# %%
start = (
    run.sft_model()
    if config.reward.init_from == "sft"
    else config.reward_model
)
tokenizer = load_tokenizer(resolve_model(start))
distributed.print_main(prepare_tokenizer(tokenizer))
blend = Blend(config.data, config.seed)
train = encode_pairs(tokenizer, blend["reward"][:rows], config.data)
held_out = encode_pairs(tokenizer, blend.evaluation("reward"), config.data)
demonstrations = encode_demonstrations(
    tokenizer, blend["sft"][:1000], config.data
)
distributed.print_main(len(train.rows), "pairs", *train.lines())

# %% [markdown]
# ## Train

# %%
scorer = load_scorer(start, tokenizer, dtype=config.critic_engine.dtype)
if config.critic_engine.lora.rank:
    add_lora(scorer, config.critic_engine.lora)
plan = [
    batch
    for epoch in range(config.reward.epochs)
    for batch in prompt_batches(
        train.rows,
        config.reward.batch_size,
        seed=config.seed,
        epoch=epoch,
        multiple=distributed.world_size(),
    )
]
engine = TrainingEngine(
    ValueModel(scorer),
    config.critic_engine,
    config.reward.optimizer,
    total_steps=len(plan),
)
trainer = RewardTrainer(
    engine, config.reward, pad_token_id=tokenizer.pad_token_id
)

# %%
phases = Phases()
log = MetricsLog(run.stage("reward"), console=["loss/train"], purge_step=0)
log(0, trainer.accuracy(held_out.rows))
for step, batch in enumerate(tqdm(plan, disable=None), start=1):
    with phases("train") as phase:
        metrics = trainer.step([train.rows[i] for i in batch])
        phase.tokens += sum(train.rows[i].tokens for i in batch)
    log(step, metrics)
accuracy = trainer.accuracy(held_out.rows)
log(len(plan), accuracy)
log.close()
distributed.print_main(accuracy)

# %% [markdown]
# ## Centre, scale, export

# %%
mean, std = trainer.normalisation(demonstrations.rows)
save_normalisation(scorer, mean=mean, std=std)
export(scorer, tokenizer, run.path / "reward")
run.finish("reward", phases, steps=len(plan), mean=mean, std=std, **accuracy)

# %%
history = read_metrics(run.path / "reward")
figure = plot_curves(
    history, {"loss": ["loss/train"], "accuracy": ["reward/accuracy"]}
)
