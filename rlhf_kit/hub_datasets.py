"""Datasets of the hub by name: one function each from a raw row to a `PreferencePair`.

The names are those DeepSpeed Chat knows (raw_datasets.py), and a few more. `DATASETS` says for
each what it serves, in which configuration it is asked for, and what its splits are called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kit.row_schemas import (
    HH_ROLES,
    RawRow,
    RefusedRow,
    checked_pair,
    hh_rlhf,
    preference,
    text_of,
    turns_of,
    user_turn,
)
from rlhf_kit.types import Message, PreferencePair

LINE_TURN = re.compile(r"(?:^|\n)[ \t]*(Human|Assistant):")
VICUNA_TURN = re.compile(r"(?:^|\s|</s>)(USER|ASSISTANT):")
VICUNA_ROLES = {"USER": "user", "ASSISTANT": "assistant"}
OASST_TURN = re.compile(r"(?:^|\n)(prompter|assistant): ")
OASST_ROLES = {"prompter": "user", "assistant": "assistant"}
CITATION = re.compile(r"\s*\[\d+(?:\s*[,-]\s*\d+)*\]")


def _inner(row: RawRow, *path: str | int) -> str:
    """The text that lies at `path`, such as question.full_text or answers.ja[0].text."""
    value: Any = row
    name = ""
    for key in path:
        if isinstance(key, int):
            if not isinstance(value, list | tuple):
                raise RefusedRow(f"{name} is no list")
            if not value:
                raise RefusedRow(f"{name} is empty")
            value = value[key]
        else:
            if not isinstance(value, Mapping):
                raise RefusedRow(f"{name} is no mapping")
            name = f"{name}.{key}" if name else key
            value = value.get(key)
            if value is None:
                raise RefusedRow(f"missing column {name}")
    if not isinstance(value, str):
        raise RefusedRow(f"{name} is not text")
    return value.strip()


def _number(row: RawRow, name: str) -> float:
    value = row.get(name)
    if value is None:
        raise RefusedRow(f"missing column {name}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise RefusedRow(f"{name} is no number") from None
    if number != number:
        raise RefusedRow(f"{name} is no number")
    return number


def synthetic_instruct(row: RawRow) -> PreferencePair:
    """Plain `prompt`, `chosen` and `rejected`: an instruction and two answers."""
    texts = [text_of(row, name).strip() for name in ("prompt", "chosen", "rejected")]
    return checked_pair([user_turn(texts[0])], texts[1], texts[2])


def reward_datasets(row: RawRow) -> PreferencePair:
    """`prompt` as "Human:" and "Assistant:" turns; each response begins with "Assistant:"."""
    prompt = text_of(row, "prompt").strip().removesuffix("Assistant:")
    turns = turns_of(prompt, LINE_TURN, HH_ROLES)
    responses = [
        text_of(row, name).strip().removeprefix("Assistant:").strip()
        for name in ("chosen", "rejected")
    ]
    return checked_pair(turns, *responses)


def webgpt(row: RawRow) -> PreferencePair:
    """`question.full_text`, two answers with scores; citations such as [1] are removed."""
    scores = [_number(row, name) for name in ("score_0", "score_1")]
    answers = [CITATION.sub("", text_of(row, name)).strip() for name in ("answer_0", "answer_1")]
    prompt = [user_turn(_inner(row, "question", "full_text"))]
    if scores[0] == scores[1]:
        raise RefusedRow("equal scores are no preference")
    chosen, rejected = answers if scores[0] > scores[1] else answers[::-1]
    return checked_pair(prompt, chosen, rejected)


def shp(row: RawRow) -> PreferencePair:
    """A post (`history`) and two comments; `labels` is 1 where human_ref_A has more votes."""
    prompt = [user_turn(text_of(row, "history"))]
    answers = [text_of(row, name).strip() for name in ("human_ref_A", "human_ref_B")]
    label = _number(row, "labels")
    if label not in (0, 1):
        raise RefusedRow("labels is neither 0 nor 1")
    chosen, rejected = answers if label == 1 else answers[::-1]
    return checked_pair(prompt, chosen, rejected)


def miracl(row: RawRow) -> PreferencePair:
    """A search `query`, a passage that answers it and, where there is one, one that does not."""
    prompt = [user_turn(text_of(row, "query"))]
    chosen = _inner(row, "positive_passages", 0, "text")
    rejected = _inner(row, "negative_passages", 0, "text") if row.get("negative_passages") else None
    return checked_pair(prompt, chosen, rejected)


def vicuna(row: RawRow) -> PreferencePair:
    """`prompt` as "USER:" and "ASSISTANT:" turns, text before them a system turn; `label`."""
    text = text_of(row, "prompt").strip()
    first = VICUNA_TURN.search(text)
    system = text[: first.start()].strip() if first else ""
    turns = [
        Message(role=turn["role"], content=turn["content"].removesuffix("</s>").strip())
        for turn in turns_of(text[first.start() :] if first else text, VICUNA_TURN, VICUNA_ROLES)
    ]
    if turns and turns[-1] == Message(role="assistant", content=""):
        turns.pop()
    if system:
        turns.insert(0, Message(role="system", content=system))
    return checked_pair(turns, text_of(row, "label").strip().removesuffix("</s>").strip())


def oasst_pairs(row: RawRow) -> PreferencePair:
    """`prompt` as lines "prompter: ..." and "assistant: ...", `chosen` and `rejected` as texts."""
    turns = turns_of(text_of(row, "prompt"), OASST_TURN, OASST_ROLES)
    responses = [text_of(row, name).strip() for name in ("chosen", "rejected")]
    return checked_pair(turns, *responses)


def _post(subreddit: str, title: str, post: str) -> list[Message]:
    return [user_turn(f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:")]


def summarize_from_feedback(row: RawRow) -> PreferencePair:
    """A Reddit post in `info` (or a news article), two summaries, the better one's place."""
    summaries = row.get("summaries")
    if not isinstance(summaries, list | tuple) or len(summaries) != 2:
        raise RefusedRow("summaries are not two")
    texts = [_inner({"summaries": summary}, "summaries", "text") for summary in summaries]
    choice = _number(row, "choice")
    if choice not in (0, 1):
        raise RefusedRow("choice is neither 0 nor 1")
    info = row.get("info")
    if isinstance(info, Mapping) and info.get("post") is None and info.get("article") is not None:
        prompt = [user_turn(f"{_inner(row, 'info', 'article')}\n\nTL;DR:")]
    else:
        prompt = _post(*(_inner(row, "info", name) for name in ("subreddit", "title", "post")))
    chosen, rejected = texts if choice == 0 else texts[::-1]
    return checked_pair(prompt, chosen, rejected)


def summarize_comparisons(row: RawRow) -> PreferencePair:
    """The same comparisons as texts: a post, and two summaries that begin with "TL;DR:"."""
    prompt = text_of(row, "prompt").strip().removesuffix("TL;DR:").strip()
    if not prompt:
        raise RefusedRow("empty prompt")
    responses = [
        text_of(row, name).strip().removeprefix("TL;DR:").strip() for name in ("chosen", "rejected")
    ]
    return checked_pair([user_turn(f"{prompt}\n\nTL;DR:")], *responses)


def zhihu(row: RawRow) -> PreferencePair:
    """A question (`INSTRUCTION`) and an answer (`RESPONSE`)."""
    return checked_pair([user_turn(text_of(row, "INSTRUCTION"))], text_of(row, "RESPONSE").strip())


def hc3(row: RawRow) -> PreferencePair:
    """A `question` and the first of the `human_answers`."""
    return checked_pair([user_turn(text_of(row, "question"))], _inner(row, "human_answers", 0))


def mkqa_chinese(row: RawRow) -> PreferencePair:
    """`queries.zh_cn` and the first of `answers.zh_cn`."""
    return _mkqa(row, "zh_cn")


def mkqa_japanese(row: RawRow) -> PreferencePair:
    """`queries.ja` and the first of `answers.ja`."""
    return _mkqa(row, "ja")


def _mkqa(row: RawRow, language: str) -> PreferencePair:
    prompt = [user_turn(_inner(row, "queries", language))]
    return checked_pair(prompt, _inner(row, "answers", language, 0, "text"))


def qg_jaquad(row: RawRow) -> PreferencePair:
    """A `question` and the `sentence` that answers it."""
    return checked_pair([user_turn(text_of(row, "question"))], text_of(row, "sentence").strip())


def qag_jaquad(row: RawRow) -> PreferencePair:
    """The first of the `questions` and the `paragraph` that answers it."""
    return checked_pair([user_turn(_inner(row, "questions", 0))], text_of(row, "paragraph").strip())


PAIRS = frozenset({"chosen", "rejected"})
DEMONSTRATIONS = frozenset({"chosen"})


@dataclass(frozen=True)
class HubDataset:
    """How a dataset of the hub is asked for and read."""

    read: Callable[[RawRow], PreferencePair]
    """One raw row to a record."""
    serves: frozenset[str] = PAIRS
    """Which of `chosen` and `rejected` its rows fill."""
    evaluation: str | None = None
    """The name of its split for evaluation, where it has one."""
    train: str = "train"
    """The name of its split for training."""
    config: str | None = None
    """The configuration it is asked for in; None is the default."""
    repository: str = ""
    """Where it lies on the hub, if not under its own name."""
    is_script: bool = False
    """It lies there as a program, which is not run: its Parquet conversion is read instead."""


DATASETS: dict[str, HubDataset] = {
    "Dahoas/rm-static": HubDataset(preference, evaluation="test"),
    "Dahoas/full-hh-rlhf": HubDataset(preference, evaluation="test"),
    "Dahoas/synthetic-instruct-gptj-pairwise": HubDataset(synthetic_instruct),
    "yitingxie/rlhf-reward-datasets": HubDataset(reward_datasets, evaluation="test"),
    "openai/webgpt_comparisons": HubDataset(webgpt, config="default", is_script=True),
    "stanfordnlp/SHP": HubDataset(shp, evaluation="validation"),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": HubDataset(vicuna, DEMONSTRATIONS, evaluation="test"),
    "Cohere/miracl-zh-queries-22-12": HubDataset(miracl, evaluation="dev"),
    "Cohere/miracl-ja-queries-22-12": HubDataset(miracl, evaluation="dev"),
    "wangrui6/Zhihu-KOL": HubDataset(zhihu, DEMONSTRATIONS),
    "Hello-SimpleAI/HC3-Chinese": HubDataset(hc3, DEMONSTRATIONS, config="all", is_script=True),
    "mkqa-Chinese": HubDataset(
        mkqa_chinese, DEMONSTRATIONS, config="mkqa", repository="apple/mkqa", is_script=True
    ),
    "mkqa-Japanese": HubDataset(
        mkqa_japanese, DEMONSTRATIONS, config="mkqa", repository="apple/mkqa", is_script=True
    ),
    "lmqg/qg_jaquad": HubDataset(
        qg_jaquad, DEMONSTRATIONS, "validation", config="default", is_script=True
    ),
    "lmqg/qag_jaquad": HubDataset(
        qag_jaquad, DEMONSTRATIONS, "validation", config="default", is_script=True
    ),
    # Not in DeepSpeed Chat:
    "Anthropic/hh-rlhf": HubDataset(hh_rlhf, evaluation="test"),
    "HuggingFaceH4/ultrafeedback_binarized": HubDataset(
        preference, train="train_prefs", evaluation="test_prefs"
    ),
    "tasksource/oasst1_pairwise_rlhf_reward": HubDataset(oasst_pairs, evaluation="validation"),
    "tasksource/oasst2_pairwise_rlhf_reward": HubDataset(oasst_pairs, evaluation="validation"),
    "openai/summarize_from_feedback": HubDataset(
        summarize_from_feedback, evaluation="validation", config="comparisons", is_script=True
    ),
    "CarperAI/openai_summarize_comparisons": HubDataset(summarize_comparisons, evaluation="valid1"),
}

NOT_READABLE = {
    "local/jsonfile": "write the path of the file itself, such as data/train.json",
    "OpenAssistant/oasst1": "its rows are single messages of a tree; "
    "tasksource/oasst1_pairwise_rlhf_reward has the same dialogues as pairs",
    "OpenAssistant/oasst2": "its rows are single messages of a tree; "
    "tasksource/oasst2_pairwise_rlhf_reward has the same dialogues as pairs",
}
"""Names people give, with what to write instead."""


def local_path(name: str) -> Path | None:
    """The file or directory of this name, where there is one."""
    path = Path(name).expanduser()
    try:
        return path if path.exists() else None
    except (OSError, ValueError):  # a name too long, or with a NUL: no file has it
        return None


def find(name: str) -> tuple[str, HubDataset] | None:
    """The dataset of this name (a revision may follow), or whose name a local directory's holds.

    Raises:
        ValueError: the name is known, and that it cannot be read; says what to do instead.
    """
    if path := local_path(name):
        held = [key for key in DATASETS if path.is_dir() and key in path.resolve().as_posix()]
        return (held[0], DATASETS[held[0]]) if held else None
    key = name.partition("@")[0]
    if key in NOT_READABLE:
        raise ValueError(f"data source {name} cannot be read: {NOT_READABLE[key]}")
    return (key, DATASETS[key]) if key in DATASETS else None
