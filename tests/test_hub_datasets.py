"""Every dataset that is known by name: rows of its schema, written for these tests.

Good rows come with the record they must become, broken rows with the reason they are refused for.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.config import SourceConfig
from rlhf_kit.datasets import NotForThisStage, RefusedRow, load_source
from rlhf_kit.hub_datasets import DATASETS, NOT_READABLE, find
from rlhf_kit.types import PreferencePair

# The sixteen names of DeepSpeed Chat's raw_datasets.py, two of them for MIRACL.
DEEPSPEED_CHAT = """
    Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise
    yitingxie/rlhf-reward-datasets openai/webgpt_comparisons stanfordnlp/SHP
    pvduy/sharegpt_alpaca_oa_vicuna_format wangrui6/Zhihu-KOL Cohere/miracl-zh-queries-22-12
    Hello-SimpleAI/HC3-Chinese mkqa-Chinese mkqa-Japanese Cohere/miracl-ja-queries-22-12
    lmqg/qg_jaquad lmqg/qag_jaquad local/jsonfile
""".split()


def record(*turns: str, chosen: str | None = None, rejected: str | None = None, system: str = ""):
    """Turns of the user and the assistant in turn."""
    prompt = [{"role": "system", "content": system}] if system else []
    for i, turn in enumerate(turns):
        prompt.append({"role": "assistant" if i % 2 else "user", "content": turn})
    return PreferencePair(tuple(prompt), chosen, rejected)  # type: ignore[arg-type]


def passages(*texts: str) -> list[dict[str, str]]:
    return [{"docid": str(i), "title": "t", "text": text} for i, text in enumerate(texts)]


def hh(*turns: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


DIALOGUES = [
    (
        {"prompt": hh("Hi?", ""), "chosen": " Hello.", "rejected": " No."},
        record("Hi?", chosen="Hello.", rejected="No."),
    ),
    (
        {"prompt": hh("1?", "1.", "2?", ""), "response": " 2.", "chosen": " 2.", "rejected": " 3."},
        record("1?", "1.", "2?", chosen="2.", rejected="3."),
    ),
    (
        {"prompt": hh("你好？", ""), "chosen": " 您好。", "rejected": " 不。"},
        record("你好？", chosen="您好。", rejected="不。"),
    ),
    (
        {"prompt": hh("元気？", ""), "chosen": " はい。", "rejected": " いいえ。"},
        record("元気？", chosen="はい。", rejected="いいえ。"),
    ),
    (
        {"prompt": hh("A\n\nB", ""), "chosen": "c", "rejected": "d"},
        record("A\n\nB", chosen="c", rejected="d"),
    ),
    ({"prompt": hh("Hi?", ""), "chosen": "", "rejected": "No."}, "empty response"),
    ({"prompt": hh("Hi?", ""), "chosen": "No.", "rejected": " No."}, "equal chosen and rejected"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "missing column prompt"),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": 3, "chosen": "a", "rejected": "b"}, "no messages where messages are expected"),
]

GPTJ = [
    (
        {"prompt": "Name a river.", "chosen": "The Danube.", "rejected": "River."},
        record("Name a river.", chosen="The Danube.", rejected="River."),
    ),
    (
        {"prompt": " Human: is a word ", "chosen": "Yes\n", "rejected": "No"},
        record("Human: is a word", chosen="Yes", rejected="No"),
    ),
    (
        {"prompt": "给一个数。", "chosen": "七", "rejected": "数"},
        record("给一个数。", chosen="七", rejected="数"),
    ),
    (
        {"prompt": "川の名前は？", "chosen": "信濃川", "rejected": "川"},
        record("川の名前は？", chosen="信濃川", rejected="川"),
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, record("a", chosen="b", rejected="c")),
    ({"prompt": "a", "chosen": None, "rejected": "c"}, "missing column chosen"),
    ({"prompt": "a", "chosen": "c", "rejected": ["c"]}, "rejected is not text"),
    ({"prompt": " ", "chosen": "b", "rejected": "c"}, "empty prompt"),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal chosen and rejected"),
    ({"prompt": "a", "chosen": "b"}, "missing column rejected"),
]

REWARD = [
    (
        {"prompt": hh("Hi?") + "\n\n", "chosen": "Assistant: Hello.", "rejected": "Assistant: No."},
        record("Hi?", chosen="Hello.", rejected="No."),
    ),
    (
        {
            "prompt": "Human: 1?\n\nAssistant: 1.\n\nHuman: 2?\n\n",
            "chosen": "Assistant: 2.",
            "rejected": "Assistant: 3.",
        },
        record("1?", "1.", "2?", chosen="2.", rejected="3."),
    ),
    (
        {"prompt": "Human: Hi?\nAssistant:", "chosen": "Assistant: a", "rejected": "b"},
        record("Hi?", chosen="a", rejected="b"),
    ),
    (
        {"prompt": "Human: 好吗？\n", "chosen": "Assistant: 好。", "rejected": "Assistant: 不。"},
        record("好吗？", chosen="好。", rejected="不。"),
    ),
    (
        {"prompt": "Human: はい？\n", "chosen": "Assistant: はい。", "rejected": "Assistant: え。"},
        record("はい？", chosen="はい。", rejected="え。"),
    ),
    (
        {"prompt": "Hi?", "chosen": "Assistant: a", "rejected": "Assistant: b"},
        "no user turn at the start",
    ),
    (
        {"prompt": "Human: Hi?", "chosen": "Assistant: ", "rejected": "Assistant: b"},
        "empty response",
    ),
    ({"prompt": "Human: \n", "chosen": "Assistant: a", "rejected": "Assistant: b"}, "empty prompt"),
    ({"prompt": "", "chosen": "Assistant: a", "rejected": "Assistant: b"}, "empty prompt"),
    (
        {"prompt": None, "chosen": "Assistant: a", "rejected": "Assistant: b"},
        "missing column prompt",
    ),
]


def webgpt(question: Any, zero: Any, one: Any, score_0: Any, score_1: Any) -> dict[str, Any]:
    return {
        "question": {"dataset": "eli5", "id": "x", "full_text": question},
        "answer_0": zero,
        "answer_1": one,
        "score_0": score_0,
        "score_1": score_1,
    }


WEBGPT = [
    (webgpt("Why?", "So [1].", "No.", 0.5, -0.5), record("Why?", chosen="So.", rejected="No.")),
    (
        webgpt("Why?", "No.", "So [1, 2], and so[3].", -1.0, 1.0),
        record("Why?", chosen="So, and so.", rejected="No."),
    ),
    (
        webgpt("Why?", "f(x) [sic] holds (see b).", "No.", 1, 0),
        record("Why?", chosen="f(x) [sic] holds (see b).", rejected="No."),
    ),
    (
        webgpt("为什么？", "因为[1]。", "不。", 1, 0),
        record("为什么？", chosen="因为。", rejected="不。"),
    ),
    (
        webgpt("なぜ？", "だめ。", "だから[2]。", 0, 0.3),
        record("なぜ？", chosen="だから。", rejected="だめ。"),
    ),
    (webgpt("Why?", "a", "b", 0.0, 0.0), "equal scores are no preference"),
    (webgpt("Why?", "a", "b", None, 0.0), "missing column score_0"),
    (webgpt("Why?", "a", "b", "high", 0.0), "score_0 is no number"),
    (webgpt("Why?", "[1]", "b", 1, 0.0), "empty response"),
    ({**webgpt("", "a", "b", 1, 0), "question": None}, "missing column question"),
    ({**webgpt("", "a", "b", 1, 0), "question": "Why?"}, "question is no mapping"),
    (webgpt("Why?", "a", "b", float("nan"), 0.0), "score_0 is no number"),
]


def shp(history: Any, a: Any, b: Any, labels: Any) -> dict[str, Any]:
    return {"history": history, "human_ref_A": a, "human_ref_B": b, "labels": labels}


SHP = [
    (shp("How?", "So.", "No.", 1), record("How?", chosen="So.", rejected="No.")),
    (shp("How?", "So.", "No.", 0), record("How?", chosen="No.", rejected="So.")),
    (shp("怎么？", "这样。", "不。", 1), record("怎么？", chosen="这样。", rejected="不。")),
    (shp("どう？", "こう。", "いや。", 0), record("どう？", chosen="いや。", rejected="こう。")),
    (shp(" How?\n\nTwo. ", "a ", " b", 1), record("How?\n\nTwo.", chosen="a", rejected="b")),
    (shp("How?", "a", "b", 2), "labels is neither 0 nor 1"),
    (shp("How?", "a", "b", None), "missing column labels"),
    (shp("How?", "a", "b", []), "labels is no number"),
    (shp(None, "a", "b", 1), "missing column history"),
    (shp("How?", "a", "", 1), "empty response"),
]

MIRACL = [
    (
        {
            "query_id": "1",
            "query": "长江多长？",
            "positive_passages": passages("六千公里。", "x"),
            "negative_passages": passages("黄河。"),
        },
        record("长江多长？", chosen="六千公里。", rejected="黄河。"),
    ),
    (
        {
            "query": "富士山の高さは？",
            "positive_passages": passages("三千。"),
            "negative_passages": passages("山。", "y"),
        },
        record("富士山の高さは？", chosen="三千。", rejected="山。"),
    ),
    (
        {"query": "How long?", "positive_passages": passages("Long."), "negative_passages": []},
        record("How long?", chosen="Long."),
    ),
    (
        {"query": "How long?", "positive_passages": passages("Long."), "negative_passages": None},
        record("How long?", chosen="Long."),
    ),
    (
        {"query": "How long?", "positive_passages": [], "negative_passages": passages("x")},
        "positive_passages is empty",
    ),
    (
        {"query": "How long?", "positive_passages": None, "negative_passages": passages("x")},
        "missing column positive_passages",
    ),
    (
        {"query": "How long?", "positive_passages": ["x"], "negative_passages": []},
        "positive_passages is no mapping",
    ),
    (
        {"query": "How long?", "positive_passages": [{"title": "t"}], "negative_passages": []},
        "missing column positive_passages.text",
    ),
    ({"query": "", "positive_passages": passages("x"), "negative_passages": []}, "empty prompt"),
    (
        {"query": None, "positive_passages": passages("x"), "negative_passages": []},
        "missing column query",
    ),
]

VICUNA = [
    ({"prompt": "USER: Hi? ASSISTANT:", "label": "Hello.</s>"}, record("Hi?", chosen="Hello.")),
    (
        {"prompt": "USER: 1? ASSISTANT: 1.</s>USER: 2? ASSISTANT:", "label": " 2."},
        record("1?", "1.", "2?", chosen="2."),
    ),
    (
        {"prompt": "Be kind. USER: Hi? ASSISTANT:", "label": "Yes."},
        record("Hi?", chosen="Yes.", system="Be kind."),
    ),
    ({"prompt": "USER: 你好？\nASSISTANT:", "label": "您好。"}, record("你好？", chosen="您好。")),
    ({"prompt": "USER: 元気？ ASSISTANT:", "label": "はい。"}, record("元気？", chosen="はい。")),
    (
        {"prompt": "USER: THE USERS ASK. ASSISTANT:", "label": "OK"},
        record("THE USERS ASK.", chosen="OK"),
    ),
    ({"prompt": "Hi?", "label": "a"}, "no user turn at the start"),
    ({"prompt": "USER: Hi? ASSISTANT:", "label": ""}, "empty response"),
    ({"prompt": "USER: ASSISTANT:", "label": "a"}, "empty prompt"),
    ({"prompt": None, "label": "a"}, "missing column prompt"),
    ({"prompt": "USER: Hi? ASSISTANT:", "label": None}, "missing column label"),
]

OASST = [
    (
        {
            "lang": "en",
            "parent_id": "p",
            "prompt": "prompter: Hi?",
            "chosen": "Hello.",
            "rejected": "No.",
        },
        record("Hi?", chosen="Hello.", rejected="No."),
    ),
    (
        {
            "prompt": "prompter: 1?\nassistant: 1.\n\n- a\nprompter: 2?",
            "chosen": "2.",
            "rejected": "3.",
        },
        record("1?", "1.\n\n- a", "2?", chosen="2.", rejected="3."),
    ),
    (
        {"lang": "zh", "prompt": "prompter: 你好？", "chosen": "您好。", "rejected": "不。"},
        record("你好？", chosen="您好。", rejected="不。"),
    ),
    (
        {"lang": "ja", "prompt": "prompter: 元気？", "chosen": "はい。", "rejected": "いや。"},
        record("元気？", chosen="はい。", rejected="いや。"),
    ),
    (
        {"prompt": "prompter: an assistant: what is it?", "chosen": "a", "rejected": "b"},
        record("an assistant: what is it?", chosen="a", rejected="b"),
    ),
    (
        {"prompt": "prompter: Hi?\nassistant: Hello.", "chosen": "a", "rejected": "b"},
        "the prompt does not end with a user turn",
    ),
    ({"prompt": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": "Hi?", "chosen": "a", "rejected": "b"}, "no user turn at the start"),
    ({"prompt": "prompter: Hi?", "chosen": "a", "rejected": None}, "missing column rejected"),
    ({"prompt": "prompter: Hi?", "chosen": "a", "rejected": "a"}, "equal chosen and rejected"),
]


def tldr(info: Any, texts: list[Any], choice: Any) -> dict[str, Any]:
    return {"info": info, "summaries": [{"text": text} for text in texts], "choice": choice}


def post(text: Any) -> dict[str, Any]:
    return {"subreddit": "tifu", "title": "T", "post": text, "site": None, "article": None}


def asked(text: str) -> str:
    return f"SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: {text}\n\nTL;DR:"


TLDR = [
    (tldr(post("Long."), [" One", "Two"], 0), record(asked("Long."), chosen="One", rejected="Two")),
    (tldr(post("Long."), ["One", "Two"], 1), record(asked("Long."), chosen="Two", rejected="One")),
    (tldr(post("很长。"), ["一", "二"], 1), record(asked("很长。"), chosen="二", rejected="一")),
    (tldr(post("長い。"), ["あ", "い"], 0), record(asked("長い。"), chosen="あ", rejected="い")),
    (
        tldr({"post": None, "article": "News."}, ["One", "Two"], 0),
        record("News.\n\nTL;DR:", chosen="One", rejected="Two"),
    ),
    (tldr(post("Long."), ["One"], 0), "summaries are not two"),
    (tldr(post("Long."), ["One", None], 0), "missing column summaries.text"),
    (tldr(post("Long."), ["One", "Two"], 2), "choice is neither 0 nor 1"),
    (tldr(post("Long."), ["One", "Two"], None), "missing column choice"),
    (tldr(None, ["One", "Two"], 0), "missing column info"),
    (tldr(post(None), ["One", "Two"], 0), "missing column info.post"),
]

CARPER = [
    (
        {"prompt": asked("Long.")[:-8], "chosen": "TL;DR: One", "rejected": "TL;DR: Two"},
        record(asked("Long."), chosen="One", rejected="Two"),
    ),
    (
        {"prompt": asked("Long."), "chosen": "One", "rejected": "Two"},
        record(asked("Long."), chosen="One", rejected="Two"),
    ),
    (
        {"prompt": "POST: 很长。", "chosen": "TL;DR: 一", "rejected": "TL;DR: 二"},
        record("POST: 很长。\n\nTL;DR:", chosen="一", rejected="二"),
    ),
    (
        {"prompt": "POST: 長い。", "chosen": "あ", "rejected": "い"},
        record("POST: 長い。\n\nTL;DR:", chosen="あ", rejected="い"),
    ),
    ({"prompt": "TL;DR:", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ({"prompt": "a", "chosen": "TL;DR:", "rejected": "b"}, "empty response"),
    ({"prompt": "a", "chosen": "TL;DR: b", "rejected": "b"}, "equal chosen and rejected"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "missing column prompt"),
    ({"prompt": "a", "chosen": 1, "rejected": "b"}, "chosen is not text"),
    ({"prompt": "a", "chosen": "c"}, "missing column rejected"),
]


def questions(question: str, answer: str) -> list[tuple[dict[str, Any], Any]]:
    """Ten rows for a dataset of two columns of text."""
    good = [
        ("水是什么？", "水。"),
        ("なに？", "みず。"),
        (" Why? ", " So. "),
        ("a\nb", "c"),
        ("x", "y"),
    ]
    bad = [
        ("", "a", "empty prompt"),
        ("a", "", "empty response"),
        (None, "a", f"missing column {question}"),
        ("a", None, f"missing column {answer}"),
        ("a", 7, f"{answer} is not text"),
        ([], "a", f"{question} is not text"),
    ]
    return [
        *(({question: q, answer: a}, record(q.strip(), chosen=a.strip())) for q, a in good),
        *(({question: q, answer: a}, reason) for q, a, reason in bad),
    ]


HC3 = [
    (
        {
            "id": "0",
            "question": "什么是云？",
            "human_answers": ["水汽。", "x"],
            "chatgpt_answers": ["云是…"],
        },
        record("什么是云？", chosen="水汽。"),
    ),
    ({"question": "What?", "human_answers": ["That."]}, record("What?", chosen="That.")),
    ({"question": "なに？", "human_answers": ["それ。"]}, record("なに？", chosen="それ。")),
    ({"question": "a", "human_answers": [" b "]}, record("a", chosen="b")),
    ({"question": "a", "human_answers": ("b",)}, record("a", chosen="b")),
    ({"question": "a", "human_answers": []}, "human_answers is empty"),
    ({"question": "a", "human_answers": None}, "missing column human_answers"),
    ({"question": "a", "human_answers": "b"}, "human_answers is no list"),
    ({"question": "a", "human_answers": [None]}, "human_answers is not text"),
    ({"question": "", "human_answers": ["b"]}, "empty prompt"),
]


def mkqa(language: str) -> list[tuple[dict[str, Any], Any]]:
    def row(query: Any, answers: Any) -> dict[str, Any]:
        others = {"en": "Who?", "fr": "Qui ?"}
        return {"queries": {**others, language: query}, "answers": {"en": [], language: answers}}

    def answer(text: Any) -> list[dict[str, Any]]:
        return [{"type": 1, "entity": "Q1", "text": text, "aliases": ["x"]}]

    return [
        (row("谁？", answer("我")), record("谁？", chosen="我")),
        (row("だれ？", answer("わたし")), record("だれ？", chosen="わたし")),
        (row("Who?", answer("I") + answer("you")), record("Who?", chosen="I")),
        (row(" a ", answer(" b ")), record("a", chosen="b")),
        (row("a", answer(None)), f"missing column answers.{language}.text"),
        (row("a", []), f"answers.{language} is empty"),
        (row("a", None), f"missing column answers.{language}"),
        (row(None, answer("b")), f"missing column queries.{language}"),
        (row("", answer("b")), "empty prompt"),
        ({"queries": None, "answers": {}}, "missing column queries"),
    ]


QAG = [
    (
        {"questions": ["なに？", "x"], "answers": ["a"], "paragraph": "それ。"},
        record("なに？", chosen="それ。"),
    ),
    ({"questions": ["什么？"], "paragraph": "那个。"}, record("什么？", chosen="那个。")),
    ({"questions": ["What?"], "paragraph": " That. "}, record("What?", chosen="That.")),
    ({"questions": ["a"], "paragraph": "b\nc"}, record("a", chosen="b\nc")),
    ({"questions": [], "paragraph": "b"}, "questions is empty"),
    ({"questions": None, "paragraph": "b"}, "missing column questions"),
    ({"questions": "a", "paragraph": "b"}, "questions is no list"),
    ({"questions": [""], "paragraph": "b"}, "empty prompt"),
    ({"questions": ["a"], "paragraph": ""}, "empty response"),
    ({"questions": ["a"], "paragraph": None}, "missing column paragraph"),
]

BOTH = [
    (
        {"chosen": hh("1?", "1.", "2?", "2."), "rejected": hh("1?", "1.", "2?", "3.")},
        record("1?", "1.", "2?", chosen="2.", rejected="3."),
    ),
    (
        {"chosen": hh("你好？", "您好。"), "rejected": hh("你好？", "不。")},
        record("你好？", chosen="您好。", rejected="不。"),
    ),
    ({"chosen": None, "rejected": hh("a", "b")}, "missing column chosen"),
    (
        {"chosen": hh("a", "b"), "rejected": hh("c", "d")},
        "chosen and rejected have different prompts",
    ),
]


def messages(*turns: str) -> list[dict[str, str]]:
    return [{"content": t, "role": "assistant" if i % 2 else "user"} for i, t in enumerate(turns)]


ULTRA = [
    (
        {
            "prompt": "Hi?",
            "chosen": messages("Hi?", "Hello."),
            "rejected": messages("Hi?", "No."),
            "score_chosen": 8.0,
        },
        record("Hi?", chosen="Hello.", rejected="No."),
    ),
    (
        {
            "prompt": "你好？",
            "chosen": messages("你好？", "您好。"),
            "rejected": messages("你好？", "不。"),
        },
        record("你好？", chosen="您好。", rejected="不。"),
    ),
    (
        {"prompt": "Hi?", "chosen": messages("Hi?", ""), "rejected": messages("Hi?", "No.")},
        "empty response",
    ),
    (
        {"prompt": "Hi?", "chosen": messages("Ho?", "a"), "rejected": messages("Hi?", "No.")},
        "chosen repeats another prompt",
    ),
    (
        {"prompt": "Hi?", "chosen": [], "rejected": messages("Hi?", "No.")},
        "no messages where messages are expected",
    ),
]

ROWS: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "Dahoas/rm-static": DIALOGUES,
    "Dahoas/full-hh-rlhf": DIALOGUES,
    "Dahoas/synthetic-instruct-gptj-pairwise": GPTJ,
    "yitingxie/rlhf-reward-datasets": REWARD,
    "openai/webgpt_comparisons": WEBGPT,
    "stanfordnlp/SHP": SHP,
    "pvduy/sharegpt_alpaca_oa_vicuna_format": VICUNA,
    "Cohere/miracl-zh-queries-22-12": MIRACL,
    "Cohere/miracl-ja-queries-22-12": MIRACL,
    "wangrui6/Zhihu-KOL": questions("INSTRUCTION", "RESPONSE"),
    "Hello-SimpleAI/HC3-Chinese": HC3,
    "mkqa-Chinese": mkqa("zh_cn"),
    "mkqa-Japanese": mkqa("ja"),
    "lmqg/qg_jaquad": questions("question", "sentence"),
    "lmqg/qag_jaquad": QAG,
    "Anthropic/hh-rlhf": BOTH,
    "HuggingFaceH4/ultrafeedback_binarized": ULTRA,
    "tasksource/oasst1_pairwise_rlhf_reward": OASST,
    "tasksource/oasst2_pairwise_rlhf_reward": OASST,
    "openai/summarize_from_feedback": TLDR,
    "CarperAI/openai_summarize_comparisons": CARPER,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_each_dataset_become_records_or_are_refused_for_the_right_reason(name: str):
    read = DATASETS[name].read
    for row, expected in ROWS[name]:
        if isinstance(expected, PreferencePair):
            assert read(row) == expected
        else:
            with pytest.raises(RefusedRow) as refused:
                read(row)
            assert str(refused.value) == expected


def test_each_dataset_has_rows_here_and_each_name_of_deepspeed_chat_is_known():
    assert set(ROWS) == set(DATASETS)
    assert set(DEEPSPEED_CHAT) <= set(DATASETS) | set(NOT_READABLE)
    for name, dataset in DATASETS.items():  # what the table says, the rows show
        good = [row for _, row in ROWS[name] if isinstance(row, PreferencePair)]
        assert any(row.rejected for row in good) == ("rejected" in dataset.serves)
        assert all(row.chosen for row in good)


def test_the_page_on_own_data_lists_every_dataset_and_what_it_serves():
    page = (Path(__file__).parents[1] / "docs" / "own-data.md").read_text(encoding="utf-8")
    table = page.split("## Datasets that are known by name")[1].split("\n## ")[0]
    listed = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            names, serves, _ = line.strip("|").split("|")
            listed |= dict.fromkeys(re.findall(r"`([^`]+)`", names), serves.strip())
    words = {True: "all", False: "SFT, PPO"}
    assert listed == {name: words["rejected" in d.serves] for name, d in DATASETS.items()}


@pytest.mark.parametrize("name", NOT_READABLE)
def test_a_name_that_cannot_be_read_says_what_to_write_instead(name: str):
    with pytest.raises(ValueError, match=f"{name} cannot be read: .*(path of|pairwise)"):
        load_source(SourceConfig(name), "sft")


# Through load_source, with the hub faked


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> list[Any]:
    import datasets

    asked_for: list[Any] = []

    def load_dataset(repository: str, **options: Any) -> list[Any]:
        asked_for.append((repository, {k: v for k, v in options.items() if v is not None}))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked_for


@pytest.mark.parametrize(
    ("name", "split", "asked_for"),
    [
        ("Dahoas/rm-static", "validation", ("Dahoas/rm-static", {"split": "test"})),
        ("stanfordnlp/SHP@v2", "train", ("stanfordnlp/SHP", {"split": "train", "revision": "v2"})),
        (
            "HuggingFaceH4/ultrafeedback_binarized",
            "train",
            ("HuggingFaceH4/ultrafeedback_binarized", {"split": "train_prefs"}),
        ),
        (
            "mkqa-Japanese",
            "train",
            (
                "apple/mkqa",
                {
                    "split": "train",
                    "revision": "refs/convert/parquet",
                    "data_files": {"train": "mkqa/train/*.parquet"},
                },
            ),
        ),
        (
            "Hello-SimpleAI/HC3-Chinese@main",
            "train",
            (
                "Hello-SimpleAI/HC3-Chinese",
                {"split": "train", "revision": "main", "name": "all"},
            ),
        ),
    ],
)
def test_the_hub_is_asked_in_the_datasets_own_words(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str, asked_for: Any
):
    key = name.partition("@")[0]
    asked = fake_hub(monkeypatch, [row for row, _ in ROWS[key]])
    rows = load_source(SourceConfig(name), "sft", split=split)
    good = [expected for _, expected in ROWS[key] if isinstance(expected, PreferencePair)]
    assert [(row.prompt, row.chosen) for row in rows.pairs] == [(p.prompt, p.chosen) for p in good]
    assert asked == [asked_for]
    assert rows.report.read == len(ROWS[key])
    assert sum(rows.report.refused.values()) == len(ROWS[key]) - len(good)


def test_a_dataset_without_a_split_for_evaluation_says_so(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch, [])
    with pytest.raises(ValueError, match="has a split for training alone; data.eval_share"):
        load_source(SourceConfig("wangrui6/Zhihu-KOL"), "sft", split="validation")


def test_a_dataset_of_demonstrations_serves_no_reward_model(monkeypatch: pytest.MonkeyPatch):
    fake_hub(monkeypatch, [row for row, _ in ROWS["wangrui6/Zhihu-KOL"]])
    with pytest.raises(NotForThisStage, match="has no rejected, which stage reward needs"):
        load_source(SourceConfig("wangrui6/Zhihu-KOL"), "reward")


def test_a_saved_directory_is_read_by_the_function_whose_name_it_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import datasets

    folder = tmp_path / "stanfordnlp" / "SHP"
    datasets.Dataset.from_list([row for row, _ in SHP[:5]]).save_to_disk(str(folder))
    rows = load_source(SourceConfig(str(folder)), "reward")
    assert [row.chosen for row in rows.pairs] == ["So.", "No.", "这样。", "いや。", "a"]
    assert "is read as stanfordnlp/SHP, whose name it holds" in capsys.readouterr().out
    # A file of one's own is read by its columns, wherever it lies.
    own = folder / "own.jsonl"
    own.write_text(json.dumps({"prompt": "a", "chosen": "b"}))
    assert find(str(own)) is None
    assert load_source(SourceConfig(str(own)), "sft").pairs[0].chosen == "b"
