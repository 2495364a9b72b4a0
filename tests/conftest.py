"""Tiny random models with a tiny tokenizer, saved once; configs, prompts and engines around them.

Shapes: D hidden size, L layers, V vocabulary: D = 32, L = 2, V about 300 everywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which DeepSpeed does too: the tests interpret its kernels.
    os.environ["TRITON_INTERPRET"] = "1"

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rlhf_kit import distributed
from rlhf_kit.checkpoint import export
from rlhf_kit.config import RunConfig, preset
from rlhf_kit.models import load_scorer, save_normalisation
from rlhf_kit.rlhf_engine import RLHFEngine
from rlhf_kit.tokenization import collate_prompts, prepare_tokenizer
from rlhf_kit.types import Message, PreferencePair, PromptBatch

# A shell's background job is started with SIGINT ignored, and its children inherit that; the
# tests that press Ctrl-C need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# The same examples on every run, unless HYPOTHESIS_PROFILE says `dev` or `nightly`.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=100, database=None
)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=200)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=5000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

TEXTS = ("Hi.", "Why?", "Name two rivers.", "Is the sky blue at noon?", "Say it again, please!")
"""Contents of prompts, of five lengths."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1},
    "gpt2": {"attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "olmo2": {"intermediate_size": 48},
}


def small_tokenizer(
    text: str = " ".join(TEXTS), *, vocabulary: int = 300
) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with <eos>, and what `prepare_tokenizer` adds: PAD and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator([text, "Human: Assistant:\n\n"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")
    prepare_tokenizer(tokenizer)
    return tokenizer


def tiny_model(kind: str, tokenizer: Any, *, eos_scale: float = 10.0, **fields: Any) -> Any:
    """A random causal LM; a large `eos_scale` makes it end often, so that responses are ragged."""
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            **PARAMETERS.get(kind, {}),
            **fields,
        },
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= eos_scale
    return model


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return small_tokenizer()


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., str]:
    """The directory of a tiny model of an architecture, written when first asked for."""
    made: dict[str, str] = {}

    def directory(kind: str = "llama", **fields: Any) -> str:
        key = f"{kind}{sorted(fields.items())}"
        if key not in made:
            path = tmp_path_factory.mktemp(kind)
            tiny_model(kind, tokenizer, **fields).save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[key] = str(path)
        return made[key]

    return directory


@pytest.fixture(scope="session")
def reward_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, model_dir: Callable[..., str]
) -> str:
    """An exported reward model whose scores have mean 0.3 and standard deviation 0.5."""
    torch.manual_seed(4)
    scorer = load_scorer(model_dir(), tokenizer)
    save_normalisation(scorer, mean=0.3, std=0.5)
    return str(export(scorer, tokenizer, tmp_path_factory.mktemp("runs") / "reward"))


@pytest.fixture(scope="session")
def tiny_args(model_dir: Callable[..., str], reward_dir: str) -> Callable[..., RunConfig]:
    """A configuration of tiny PPO: 8 prompts, minibatches of 4, micro-batches of 2."""

    def args(**changes: Any) -> RunConfig:
        values = {
            "actor_model": model_dir(),
            "reward_model": reward_dir,
            "generation__max_new_tokens": 8,
            "ppo__batch_size": 8,
            "ppo__minibatch_size": 4,
            "ppo__micro_batch_size": 2,
            "ppo__iterations": 4,
            "ppo__critic_warmup_iterations": 0,
            "ppo__epochs": 1,
            "ppo__kl__coef": 0.2,
            "ppo__actor_optimizer__learning_rate": 1e-3,
            "ppo__critic_optimizer__learning_rate": 5e-4,
            "ppo__mixture__kind": "none",
            "ppo__mixture__batch_ratio": 1.0,
        }
        return preset("toy", **{**values, **changes})

    return args


@pytest.fixture(scope="session")
def build(tokenizer: Any) -> Callable[[RunConfig], RLHFEngine]:
    """An `RLHFEngine` of tiny models, by the call that the announcement prints."""

    def engine(args: RunConfig) -> RLHFEngine:
        return RLHFEngine(
            actor_model_name_or_path=args.actor_model_name_or_path,
            critic_model_name_or_path=args.critic_model_name_or_path,
            tokenizer=tokenizer,
            num_total_iters=args.ppo.iterations,
            args=args,
        )

    return engine


def prompt(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def prompt_rows(count: int) -> list[PreferencePair]:
    """Prompts of ragged lengths, with a demonstration and a worse response."""
    return [
        PreferencePair(
            prompt(f"{TEXTS[i % len(TEXTS)]} {i}"),
            chosen=f"{i} is good" + " indeed" * (i % 3),
            rejected=f"no {i}",
            kind=("short", "long")[i % 2],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> Callable[..., PromptBatch]:
    """A left-padded batch of ragged prompts."""

    def batch(count: int = 8, *, first_seed: int = 100) -> PromptBatch:
        seeds = range(first_seed, first_seed + count)
        return collate_prompts(tokenizer, prompt_rows(count), seeds=seeds)

    return batch


def copied(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def shared_data() -> Path:
    """Data beside the repository, where there is any; RLHF_KIT_SHARED_DATA names another place."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("RLHF_KIT_SHARED_DATA", beside))


def run_ranks(world: int, act: Callable[..., None], *arguments: Any, seconds: float = 280) -> None:
    """`act(*arguments)` in `world` processes that are each other's ranks, on one thread each.

    They are forked from one that has imported what takes long. `act` must be a module's own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "rlhf_kit.preflight", "rlhf_kit.ppo"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        context.Process(target=_as_rank, args=(rank, world, port, act, *arguments), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(seconds)
    assert [process.exitcode for process in ranks] == [0] * world


def _as_rank(rank: int, world: int, port: int, act: Callable[..., None], *arguments: Any) -> None:
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    act(*arguments)
    distributed.barrier()
