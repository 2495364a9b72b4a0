"""The four models: load actor, ref, critic and reward model; value head; LoRA.

Shapes: B batch, R response tokens, T sequence tokens, D hidden size.

Any causal LM that transformers can load becomes an actor or a ref; its
`AutoModelForSequenceClassification` sibling with one label becomes a reward model, read at the
last token, or a critic, read at every token.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_kit.chat_template import first_line
from rlhf_kit.config import LoRAConfig, require
from rlhf_kit.trust import check_model_directory, check_settings, parameter_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOY_WORLD = "toy_world"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def resolve_model(name: str) -> str:
    """A model's hub name or directory; `toy_world` is the base model shipped with the kit.

    A name that looks like a path must exist: it would otherwise be asked for on the hub.
    """
    if name == TOY_WORLD:
        return str(Path(__file__).parent / "toy_world" / "base")
    path = Path(name).expanduser()
    if path.is_dir():
        require(
            (path / "config.json").is_file(),
            f"{name} is no model directory: it has no config.json",
        )
        return str(path)
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    require(not looks_like_path, f"model directory {name} does not exist")
    return name


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """A fresh score head is expected here, where transformers prints a table and bars."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, in the modules and in what the forward reads.

    Rollout, old and new logprobs have to come from the same function; a ratio of 1 on the first
    minibatch is impossible with dropout in one of them (checklist row 6).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()) if config is not None else []:
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)


def _load(auto_class: Any, name: str, dtype: str, **kwargs: Any) -> tuple[PreTrainedModel, set]:
    """A model and the names of its parameters that its files lack, all of them of a fresh head.

    ValueError, one sentence, where the directory fails `check_model_directory`, does not fit its
    weights, or is none of transformers' own architectures.
    """
    from transformers import AutoConfig, PreTrainedConfig

    path = resolve_model(name)
    local = os.path.isdir(path)
    if local:
        check_model_directory(path, verify=True)
    common = {"local_files_only": local, "trust_remote_code": False}
    with quiet_transformers(), _in_one_sentence(name, local):
        if not local:
            # No Python of the hub's is run; that would come in by names in the configuration.
            settings, _ = PreTrainedConfig.get_config_dict(path)
            check_settings(settings, f"config.json of {name}", ignored=frozenset({"auto_map"}))
        config = AutoConfig.from_pretrained(path, **common, **kwargs)
        if local:
            _check_size(auto_class, config, path)
        model, info = auto_class.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **common,
        )
    missing = set(info["missing_keys"])
    mismatched = sorted(str(key[0]) for key in info["mismatched_keys"])
    require(
        not mismatched,
        f"the config.json of {name} does not fit its weights: {mismatched and mismatched[0]} has "
        "another shape; download or export both again",
    )
    lacking = sorted(key for key in missing if not key.startswith("score."))
    require(
        not lacking,
        f"{name} lacks {lacking and lacking[0]}, which a {type(model).__name__} has; it holds "
        "another kind of model, or is broken: download or export it again",
    )
    disable_dropout(model)
    model.config.use_cache = False
    return model, missing


def _check_size(auto_class: Any, config: Any, path: str) -> None:
    """Refuse a configuration far larger than the weights, before memory is taken for it."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    described, held = sum(p.numel() for p in model.parameters()), parameter_count(path)
    require(
        described <= 2 * held,
        f"the config.json of {path} describes {described:,} parameters and its weights hold "
        f"{held:,}; download or export both again",
    )


@contextlib.contextmanager
def _in_one_sentence(name: str, local: bool) -> Iterator[None]:
    """What goes wrong inside transformers, as a ValueError; memory that runs out stays what it is.

    A broken configuration raises whatever its numbers run into.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = first_line(error)
        raise ValueError(
            f"the model in {name} cannot be loaded: {reason}"
            if local
            else f"{name} is no local directory, and the hub gave no model of that name that can "
            f"be loaded; check the spelling, or download it and give the directory ({reason})"
        ) from error


def _fit_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings to the tokenizer and write its special ids into the config."""
    embeddings: Any = model.get_input_embeddings()
    if len(tokenizer) > embeddings.weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.bos_token_id is not None:
        model.config.bos_token_id = tokenizer.bos_token_id


def load_causal_lm(
    name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str = "fp32"
) -> PreTrainedModel:
    """An actor or a ref: dropout off, embeddings and special tokens as the tokenizer has them."""
    from transformers import AutoModelForCausalLM

    model, _ = _load(AutoModelForCausalLM, name, dtype)
    _fit_tokenizer(model, tokenizer)
    generation = model.generation_config
    generation.pad_token_id = tokenizer.pad_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model


def load_scorer(
    name: str, tokenizer: PreTrainedTokenizerBase, *, dtype: str = "fp32"
) -> PreTrainedModel:
    """A sequence classifier with one label, for a reward model or a critic.

    A fresh head is drawn from N(0, 1 / (D + 1)), so that first scores are of order 1 (Stiennon
    et al. 2020, appendix B; checklist row 8). The caller seeds torch.
    """
    from transformers import AutoModelForSequenceClassification

    model, missing = _load(AutoModelForSequenceClassification, name, dtype, num_labels=1)
    _fit_tokenizer(model, tokenizer)
    if any(key.startswith("score.") for key in missing):
        head = score_head(model)
        nn.init.normal_(head.weight, std=1 / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            nn.init.zeros_(head.bias)
    return model


def score_head(model: nn.Module) -> nn.Linear:
    """The linear layer from hidden states to the score, `score` in transformers."""
    head = getattr(model, "score", None)
    require(
        isinstance(head, nn.Linear),
        f"{type(model).__name__} has no linear `score` head; use an architecture whose sequence "
        "classifier has one (Llama, OPT, GPT-2, GPT-NeoX, Mistral, Qwen, Gemma ...)",
    )
    assert isinstance(head, nn.Linear)
    return head


def position_ids(attention_mask: Tensor) -> Tensor:
    """[B, T] positions that count real tokens only, 0 on padding before the first.

    Explicit in every forward: GPT-2 takes the column number otherwise, and left padding would
    then change its logprobs.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class ValueModel(nn.Module):
    """A scorer read at every token: the critic's values, and the reward model's score.

    `mean` and `std` are the reward model's saved normalisation: a critic that starts from it
    then starts in the units of the normalised score.
    """

    def __init__(self, scorer: Any, *, mean: float = 0.0, std: float = 1.0):
        super().__init__()
        self.scorer = scorer
        self.mean = mean
        self.std = std
        score_head(scorer)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        self.scorer.gradient_checkpointing_enable(**settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, T] ids and mask -> [B, T] fp32 values; column t has read tokens up to t.

        Rows that are padded on the right alone need no mask.
        """
        where = {}
        if attention_mask is not None:
            where = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
        hidden = self.scorer.base_model(
            input_ids=input_ids, use_cache=False, **where
        ).last_hidden_state
        return (self.scorer.score(hidden).squeeze(-1).float() - self.mean) / self.std


def saved_normalisation(scorer: Any) -> tuple[float, float]:
    """Mean and standard deviation of scores that the reward stage wrote into config.json.

    Of a scorer, or of its configuration alone.
    """
    config = getattr(scorer, "config", scorer)
    return float(getattr(config, "score_mean", 0.0)), float(getattr(config, "score_std", 1.0))


def save_normalisation(scorer: PreTrainedModel, *, mean: float, std: float) -> None:
    """Put mean and standard deviation of scores into the config that is exported with it."""
    scorer.config.score_mean = mean
    scorer.config.score_std = std


def response_logits(
    model: Callable[..., Any], sequences: Tensor, attention_mask: Tensor, response_length: int
) -> Tensor:
    """Logits [B, R, V] that predict the last R = `response_length` tokens of [B, T] sequences.

    `model` is a causal LM or an engine around one.
    Logits of the prompt are never made (`logits_to_keep`): most of T x V would be waste.
    """
    logits = model(
        input_ids=sequences,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def add_lora(model: PreTrainedModel, lora: LoRAConfig, *, name: str = "default") -> None:
    """Put adapters into `model` in place; afterwards they alone, and a score head, train.

    `name` tells them from others in the same model.
    """
    import peft

    names = lora.target_modules
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=names if names == "all-linear" else [n.strip() for n in names.split(",")],
        exclude_modules=["score", "lm_head", "embed_out"],
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, model, adapter_name=name)
    if isinstance(getattr(model, "score", None), nn.Linear):
        score_head(model).requires_grad_(True)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, adapters do nothing: the actor computes bit for bit what its base did."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def has_adapters(model: nn.Module) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with adapters added into their base weights, under the plain model's names.

    The live weights stay as they are: merging in place is not reversible in bf16.
    """
    from peft.tuners.lora import LoraLayer

    merged: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            for adapter in layer.active_adapters:
                deltas[f"{name}.weight"] = layer.get_delta_weight(adapter)
    for key, tensor in model.state_dict().items():
        if ".lora_" not in key:
            merged[key.replace(".base_layer.", ".")] = tensor
    for key, delta in deltas.items():
        merged[key] = (merged[key].float() + delta.float()).to(merged[key].dtype)
    return merged
