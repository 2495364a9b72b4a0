"""Whatever the server refuses, a Chinese page says in Chinese."""

from __future__ import annotations

import ast
import string
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the app's extra is not installed")

from apps import limits
from apps.limits import Limits, check_dialogue, check_settings
from apps.refusals import OTHERS, PATTERNS, SENTENCES, refusal
from rlhf_kit import chat
from rlhf_kit.hybrid_engine import decode

APPS = Path(limits.__file__).parent
ENGINE = ("checkpoints", "generation", "history", "limits", "memory", "pool", "progress", "scores")
BEFORE_THE_PAGE = (
    "there is no directory",
    "holds neither a model",
    "holds no finished model yet",
)
"""What is said in the terminal, where no page is served then."""


def literal(node: ast.AST) -> str:
    """A text or an f-string with a word in each place; "" for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "42" for part in node.values)
    return ""


def refused(path: Path) -> Iterator[str]:
    """The sentences that a file's errors say, and those that it writes into answers and notes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func)
            if name in ("require", "ValueError", "OutOfMemory", "NotFinite", "notes.append"):
                yield literal(node.args[-1])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "answer.error":
            yield literal(node.value)


def said() -> set[str]:
    found = {text for name in (*ENGINE, "votes") for text in refused(APPS / f"{name}.py")}
    found |= {limits.IN_TURN}
    found |= {text for text in refused(Path(chat.__file__)) if "with its template" in text}
    found |= {text for text in refused(Path(decode.__file__)) if "not finite" in text}
    return {text for text in found if text and not any(part in text for part in BEFORE_THE_PAGE)}


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def test_every_sentence_of_the_engine_has_its_chinese_and_no_chinese_is_left_over():
    sentences = said()
    assert len(sentences) > 45
    unknown = {text for text in sentences if refusal("zh", text).startswith(OTHERS[:5])}
    assert unknown == set()
    unused = [p.pattern for p, _ in PATTERNS if not any(map(p.fullmatch, sentences))]
    assert unused == []


def test_both_languages_have_the_same_places():
    for english, chinese in SENTENCES.items():
        places = [
            {p for _, p, _, _ in string.Formatter().parse(t) if p} for t in (english, chinese)
        ]
        assert places[0] == places[1], english
        assert is_chinese(chinese)


def test_numbers_and_names_come_through_in_chinese():
    with pytest.raises(ValueError) as error:
        check_settings(Limits(), temperature=99)
    assert refusal("zh", str(error.value)) == "温度必须是 0 到 2 之间的数，而不是 99"
    with pytest.raises(ValueError) as error:
        check_dialogue(Limits(), [{"role": "user", "content": "x" * 20_001}])
    assert refusal("zh", str(error.value)) == "消息最多 20,000 个字符，现有 20,001 个；请缩短"
    assert refusal("en", str(error.value)) == str(error.value)


def test_a_sentence_without_its_chinese_is_shown_as_it_is_and_said_to_be_english():
    text = "final: config.json names Python code to import; delete it"
    assert refusal("zh", text) == f"出错了（英文说明）：{text}"
