"""Random models of well-known shapes, built on the device; engines and prompts around them.

Random weights take the same time as trained ones; what they say does not matter here.
"""

from __future__ import annotations

import platform
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import torch

from rlhf_kit.models import disable_dropout
from rlhf_kit.types import PromptBatch

_OPT = {"vocab_size": 50272, "max_position_embeddings": 2048}
_QWEN = {"vocab_size": 151936, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> tuple[str, dict[str, Any]]:
    size = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return "opt", _OPT | size | {"ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden} | more


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-0.5b": (
        "qwen2",
        _QWEN
        | {
            "hidden_size": 896,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "intermediate_size": 4864,
        },
    ),
    "qwen2.5-1.5b": (
        "qwen2",
        _QWEN
        | {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
        },
    ),
    "tiny": _opt(64, 2, 4, vocab_size=512),
}


def causal_lm(name: str, *, device: str, dtype: torch.dtype) -> Any:
    """A random causal LM of a shape of SHAPES."""
    import transformers

    kind, fields = SHAPES[name]
    config = transformers.AutoConfig.for_model(kind, **fields)
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = transformers.AutoModelForCausalLM.from_config(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    disable_dropout(model)
    return model


def scorer(name: str, *, device: str, dtype: torch.dtype) -> Any:
    """A random sequence classifier with one label of a shape of SHAPES."""
    import transformers

    kind, fields = SHAPES[name]
    config = transformers.AutoConfig.for_model(kind, num_labels=1, pad_token_id=1, **fields)
    torch.manual_seed(1)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
    disable_dropout(model)
    return model


def write_config(name: str, folder: Path) -> str:
    """The directory in `folder` with the configuration of a shape of SHAPES, and no weights."""
    import transformers

    kind, fields = SHAPES[name]
    transformers.AutoConfig.for_model(kind, **fields).save_pretrained(folder / name)
    return str(folder / name)


def word_tokenizer() -> Any:
    """A tokenizer of a handful of words: prompts here are numbers already."""
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


def prompts(rows: int, length: int, vocabulary: int, *, seed: int = 1) -> PromptBatch:
    """Rows of random tokens, all of one length."""
    chance = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, vocabulary - 10, (rows, length), generator=chance)
    mask = torch.ones_like(ids, dtype=torch.bool)
    return PromptBatch(ids, mask, torch.arange(rows) + 1000 * seed, ((),) * rows)


def environment() -> dict[str, Any]:
    """Where and when a figure was measured, and of which commit."""
    import transformers

    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True
    )
    cuda = torch.cuda.is_available()
    return {
        "date": str(date.today()),
        "commit": commit.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
