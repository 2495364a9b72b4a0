"""The published recipes: each is a whole configuration, and fits the GPUs it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from rlhf_kit import cli
from rlhf_kit.config import RunConfig, preset
from rlhf_kit.hub_datasets import find
from rlhf_kit.hybrid_engine.device import device
from rlhf_kit.hybrid_engine.memory import Plan
from rlhf_kit.recipes import DEVICES, RECIPES

DOCS = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
SIZES = {
    # hidden size, layers, heads
    "facebook/opt-350m": (1024, 24, 16),
    "facebook/opt-1.3b": (2048, 24, 32),
    "facebook/opt-6.7b": (4096, 32, 32),
    "facebook/opt-13b": (5120, 40, 40),
    "facebook/opt-66b": (9216, 64, 72),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_whole_configuration_that_its_gpus_can_share(name: str):
    config = preset(name)
    assert config.preset == name
    assert all(find(source.name) for source in config.data.sources)
    gpu, ranks = DEVICES[name]
    assert device(gpu).name == gpu
    config.ppo.check_ranks(ranks)
    assert ranks % config.actor_engine.generation_tp == 0
    assert config.ppo.critic_warmup_iterations < config.ppo.iterations
    assert (ranks == 1) == name.endswith("single-gpu")
    assert (ranks > 8) == name.endswith("multi-node")


def test_rates_and_rows_are_the_published_ones():
    one, node, large = (
        preset(name)
        for name in ("opt-1.3b-single-gpu", "opt-1.3b-single-node", "opt-13b-single-node")
    )
    # Rows a GPU x GPUs x accumulated: 16 x 8, 8 x 8, 4 x 8; 16 x 4, 4 x 8; 16 x 2, 4 x 8, 16 x 8.
    assert [c.sft.batch_size for c in (one, node, large)] == [128, 64, 32]
    assert [c.reward.batch_size for c in (one, node)] == [64, 32]
    assert [c.ppo.minibatch_size for c in (one, node, large)] == [32, 32, 128]
    assert preset("opt-66b-multi-node").ppo.minibatch_size == 4 * 64
    assert node.ppo.actor_optimizer.learning_rate == 9.65e-6
    assert (node.ppo.critic_optimizer.learning_rate, node.ppo.kl.coef) == (5e-6, 0.1)
    assert (node.reward.optimizer.learning_rate, node.reward.optimizer.weight_decay) == (5e-5, 0.1)
    assert (node.data.max_prompt_length, node.generation.max_new_tokens) == (256, 256)
    assert node.data.split == (2, 4, 4)


def test_a_recipe_is_a_preset_of_the_command_line(capsys: pytest.CaptureFixture[str]):
    words = ["--preset", "opt-1.3b-single-gpu", "--actor-model", "toy_world", "--gpu", "a6000"]
    assert cli.main(["plan", *words, "--set", "reward.init_from=sft"]) == 0
    assert "it fits" in capsys.readouterr().out


def test_the_page_lists_every_recipe():
    text = DOCS.read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_gpus(name: str, tmp_path: Path):
    def local(model: str) -> str:
        path = tmp_path / model
        if model not in SIZES:
            transformers.LlamaConfig().save_pretrained(path)  # its defaults are Llama 7B's
            return str(path)
        hidden, layers, heads = SIZES[model]
        transformers.OPTConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            ffn_dim=4 * hidden,
            word_embed_proj_dim=512 if model.endswith("350m") else hidden,
        ).save_pretrained(path)
        return str(path)

    config: RunConfig = preset(name)
    models = {key: local(getattr(config, key)) for key in ("actor_model", "reward_model")}
    gpu, ranks = DEVICES[name]
    assert Plan.of(preset(name, **models), ranks=ranks).fits(device(gpu).memory)
