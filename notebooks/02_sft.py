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
# # 02 Supervised fine-tuning
#
# Goal: teach the base model the *form* of a dialogue from demonstrations.

# %% tags=["parameters"]
preset: str = "toy"  # toy, consumer or cluster
run_dir: str = "runs/notebooks"  # where models and metrics go
seed: int | None = None  # decides data order and initialisation
actor_model: str | None = None  # hub name or directory of the base model
epochs: int | None = None  # passes over the demonstrations
rows: int | None = None  # use at most this many demonstrations
learning_rate: float | None = None  # peak learning rate
zero_stage: int | None = None  # ZeRO stage of the actor, 0 to 3
lora_rank: int | None = None  # adapters of this rank; 0 trains all weights

# %%
from rlhf_kit import launch

launch.read_flags(globals())

# %%
from rlhf_kit import distributed
from rlhf_kit.blending import Blend, length_bucketed_batches
from rlhf_kit.checkpoint import export
from rlhf_kit.hybrid_engine.training import TrainingEngine, start_deepspeed
from rlhf_kit.metrics import MetricsLog, Phases, read_metrics
from rlhf_kit.models import add_lora, load_causal_lm, resolve_model
from rlhf_kit.plots import plot_curves
from rlhf_kit.run_directory import RunDirectory
from rlhf_kit.sft import SFTTrainer
from rlhf_kit.tokenization import (
    encode_demonstrations,
    load_tokenizer,
    prepare_tokenizer,
)
from tqdm.auto import tqdm

start_deepspeed()
run = RunDirectory.open(
    run_dir,
    preset_name=preset,
    seed=seed,
    actor_model=actor_model,
    sft__epochs=epochs,
    sft__optimizer__learning_rate=learning_rate,
    actor_engine__zero_stage=zero_stage,
    actor_engine__lora__rank=lora_rank,
)
config = run.config
distributed.seed_everything(config.seed)

# %% [markdown]
# ## The rows

# %%
tokenizer = load_tokenizer(resolve_model(config.actor_model))
distributed.print_main(prepare_tokenizer(tokenizer))
blend = Blend(config.data, config.seed)
train = encode_demonstrations(tokenizer, blend["sft"][:rows], config.data)
held_out = encode_demonstrations(
    tokenizer, blend.evaluation("sft"), config.data
)
distributed.print_main(len(train.rows), "demonstrations", *train.lines())
lengths = [row.length for row in train.rows]

# %% [markdown]
# ## Train

# %%
model = load_causal_lm(
    config.actor_model, tokenizer, dtype=config.actor_engine.dtype
)
if config.actor_engine.lora.rank:
    add_lora(model, config.actor_engine.lora)
plan = [
    batch
    for epoch in range(config.sft.epochs)
    for batch in length_bucketed_batches(
        lengths,
        config.sft.batch_size,
        seed=config.seed,
        epoch=epoch,
        drop_last=len(lengths) >= config.sft.batch_size,
    )
]
engine = TrainingEngine(
    model, config.actor_engine, config.sft.optimizer, total_steps=len(plan)
)
trainer = SFTTrainer(engine, config.sft, pad_token_id=tokenizer.pad_token_id)

# %%
phases = Phases()
log = MetricsLog(run.stage("sft"), console=["loss/train"], purge_step=0)
log(0, {"loss/eval": trainer.evaluate(held_out.rows)})
for step, batch in enumerate(tqdm(plan, disable=None), start=1):
    with phases("train") as phase:
        metrics = trainer.step([train.rows[i] for i in batch])
        phase.tokens += sum(lengths[i] for i in batch)
    log(step, metrics)
log(len(plan), {"loss/eval": trainer.evaluate(held_out.rows)})
log.close()

# %%
export(engine.module, tokenizer, run.path / "sft")
run.finish("sft", phases, steps=len(plan))

# %%
history = read_metrics(run.path / "sft")
figure = plot_curves(history, {"loss": ["loss/train", "loss/eval"]})
