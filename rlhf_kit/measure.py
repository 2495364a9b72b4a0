"""Measure one model: an actor's responses, a reward model's choices, distances of weights.

Shapes: B batch, R response tokens, N prompts (or pairs) in all.

Models come in through the Protocols of `types.py`. Results stay in the order of the prompts, so
that two actors can be compared prompt by prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from rlhf_kit.config import GenerationConfig, require
from rlhf_kit.distributed import is_main_rank
from rlhf_kit.functional import kl_k1, kl_k3
from rlhf_kit.statistics import (
    Calibration,
    Correlation,
    Interval,
    bootstrap_interval,
    calibration,
    length_correlation,
)
from rlhf_kit.types import Generate, Message, PreferencePair, PromptBatch, Rollout, Score

Judge = Callable[[Sequence[Message], str, bool], Any]
"""(prompt, response text, ended) -> a number, or a dataclass of numbers with a field `total`."""


@dataclass(frozen=True)
class ActorEvaluation:
    """One model's responses to N held-out prompts, in their order."""

    dialogues: tuple[tuple[Message, ...], ...]
    responses: tuple[str, ...]
    length: np.ndarray
    """[N] tokens, the EOS included."""
    ended: np.ndarray
    """[N] bool, False where the length limit cut the response."""
    gold: dict[str, np.ndarray]
    """[N] of each component the judge names, and `total`; empty without a judge."""
    proxy: np.ndarray | None
    """[N] the reward model's scores, as `score` returned them."""
    kl: np.ndarray | None
    """[N] nats a sequence: sum over the response of log p(token) - log p_ref(token) (k1)."""
    kl_k3: np.ndarray | None
    """[N] nats a sequence by the k3 estimator."""


@dataclass(frozen=True)
class RewardModelEvaluation:
    """A reward model on N held-out pairs."""

    accuracy: Interval
    """Share of pairs whose chosen response scores higher; equal scores count as half."""
    accuracy_by_kind: dict[str, float]
    accuracy_by_family: dict[str, float]
    mean_margin: float
    """Mean score of chosen minus rejected."""
    calibration: Calibration
    length: Correlation
    """Score difference against length difference in words; `partial` controls for the label."""
    pairs: int


def evaluate_actor(
    generate: Generate,
    prompts: Sequence[PromptBatch],
    generation: GenerationConfig,
    *,
    decode: Callable[[list[int]], str],
    score: Score | None = None,
    judge: Judge | None = None,
    ref_logprobs: Callable[[Rollout], Tensor] | None = None,
    name: str = "actor",
) -> ActorEvaluation:
    """Generate one response a prompt and measure it every way that is asked for.

    decode: response ids, padding removed, to text; EOS must not show in the text.
    ref_logprobs: a rollout to the SFT model's [B, R] logprobs of its tokens. The KL estimate
        needs samples of the model itself: ValueError unless it is sampled at temperature 1 from
        the whole vocabulary.
    name: for the progress bar.
    """
    whole = generation.temperature == 1 and generation.top_k == 0 and generation.top_p == 1
    require(
        ref_logprobs is None or whole,
        "the KL to the SFT model is estimated at temperature 1 without top-k and top-p; "
        "leave ref_logprobs out elsewhere",
    )
    require(len(prompts) > 0, "an evaluation needs at least one batch of prompts")
    columns: list[dict[str, Any]] = []
    quiet = None if is_main_rank() else True  # None: a bar in a terminal, none in a log file
    for batch in tqdm(prompts, desc=f"evaluate {name}", leave=False, disable=quiet):
        rollout = generate(batch, generation)
        rows = _rows(rollout, decode)
        if judge is not None:
            for row in rows:
                row["gold"] = _components(judge(row["dialogue"], row["response"], row["ended"]))
        if score is not None:
            _add(rows, "proxy", score(rollout))
        if ref_logprobs is not None:
            ref = ref_logprobs(rollout)
            for key, estimate in (("kl", kl_k1), ("kl_k3", kl_k3)):
                tokens = estimate(rollout.logprobs, ref)
                _add(rows, key, tokens.masked_fill(~rollout.response_mask, 0.0).sum(-1))
        columns += rows
    return _collect(columns)


def evaluate_reward_model(
    score_pairs: Callable[[Sequence[PreferencePair]], tuple[Any, Any]],
    pairs: Sequence[PreferencePair],
    *,
    families: Sequence[str] = (),
    resamples: int = 1000,
) -> RewardModelEvaluation:
    """Accuracy by kind and family of pair, calibration and the pull of length.

    score_pairs: pairs -> scores [N] of the chosen and [N] of the rejected responses.
    families: [N] names of what the prompts ask for, where known.
    """
    require(len(pairs) > 0, "a reward model's evaluation needs at least one pair")
    chosen, rejected = (_array(scores) for scores in score_pairs(pairs))
    margins = chosen - rejected
    right = (np.sign(margins) + 1) / 2
    longer = np.array([_words(pair.chosen) - _words(pair.rejected) for pair in pairs], float)
    return RewardModelEvaluation(
        accuracy=bootstrap_interval(right, resamples=resamples),
        accuracy_by_kind=_by(right, [pair.kind for pair in pairs]),
        accuracy_by_family=_by(right, families) if families else {},
        mean_margin=float(margins.mean()),
        calibration=calibration(margins),
        length=length_correlation(
            # both orders of each pair: which response comes first must not matter
            np.concatenate([margins, -margins]),
            np.concatenate([longer, -longer]),
            control=np.repeat([1.0, -1.0], len(pairs)),
        ),
        pairs=len(pairs),
    )


def weight_distance(
    a: str | Path | Mapping[str, Tensor], b: str | Path | Mapping[str, Tensor]
) -> dict[str, float]:
    """How far the weights `a` are from `b`: directories with safetensors, or state dicts.

    Returns `relative_l2`, ||a - b|| / ||b|| over the floating-point tensors that both have in
    one shape; `changed`, the share of their entries that differ at all; and `compared`, the
    number of tensors. Directories are read tensor by tensor, so that size is no matter.
    """
    first, second = _tensors(a), _tensors(b)
    square = norm = 0.0
    changed = entries = compared = 0
    for name in sorted(first.keys() & second.keys()):
        x, y = first[name](), second[name]()
        if not x.is_floating_point() or x.shape != y.shape:
            continue
        x, y = x.float(), y.float()
        square += float(torch.linalg.vector_norm(x - y, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(y, dtype=torch.float64)) ** 2
        changed += int((x != y).sum())
        entries += x.numel()
        compared += 1
    require(compared > 0 and norm > 0, f"{a} and {b} share no weights that could be compared")
    return {
        "relative_l2": (square / norm) ** 0.5,
        "changed": changed / entries,
        "compared": compared,
    }


def _tensors(source: str | Path | Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Name -> a function that reads the tensor."""
    if isinstance(source, Mapping):
        return {name: lambda tensor=tensor: tensor for name, tensor in source.items()}
    from safetensors import safe_open

    readers: dict[str, Callable[[], Tensor]] = {}
    for path in sorted(Path(source).glob("*.safetensors")):
        file = safe_open(str(path), framework="pt")
        names: list[str] = file.keys()
        readers |= {name: lambda file=file, name=name: file.get_tensor(name) for name in names}
    require(bool(readers), f"{source} holds no *.safetensors weights")
    return readers


def _rows(rollout: Rollout, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    lengths = rollout.response_mask.sum(-1).tolist()
    ids = rollout.response_ids.tolist()
    return [
        {
            "dialogue": dialogue,
            "response": decode(row[:length]).strip(),
            "length": length,
            "ended": bool(ended),
        }
        for dialogue, row, length, ended in zip(
            rollout.prompts.dialogues, ids, lengths, rollout.ended.tolist(), strict=True
        )
    ]


def _add(rows: list[dict[str, Any]], key: str, values: Tensor) -> None:
    for row, value in zip(rows, _array(values).tolist(), strict=True):
        row[key] = value


def _collect(rows: Sequence[Mapping[str, Any]]) -> ActorEvaluation:
    def column(key: str) -> np.ndarray | None:
        return np.array([row[key] for row in rows]) if key in rows[0] else None

    parts = rows[0].get("gold", {})
    length, ended = column("length"), column("ended")
    assert length is not None and ended is not None
    return ActorEvaluation(
        dialogues=tuple(row["dialogue"] for row in rows),
        responses=tuple(row["response"] for row in rows),
        length=length,
        ended=ended,
        gold={part: np.array([row["gold"][part] for row in rows]) for part in parts},
        proxy=column("proxy"),
        kl=column("kl"),
        kl_k3=column("kl_k3"),
    )


def _components(verdict: Any) -> dict[str, float]:
    parts = vars(verdict) if dataclasses.is_dataclass(verdict) else {"total": verdict}
    return {name: float(value) for name, value in parts.items()}


def _by(right: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Mean of `right` by name, unnamed rows left out."""
    labels = np.array(names)
    require(len(labels) == len(right), "name the family of every pair, or of none")
    return {name: float(right[labels == name].mean()) for name in sorted(set(names) - {""})}


def _array(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=float)


def _words(text: str | None) -> int:
    return len((text or "").split())
