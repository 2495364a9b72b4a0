"""The READMEs: the Chinese one says what the English one says, and what they name is there."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def numbers(text: str) -> Counter[str]:
    """Every number of the prose and the tables, as it is written."""
    return Counter(re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+", FENCE.sub("", text)))


def links(text: str) -> list[str]:
    """Targets of links and images; an anchor is in the page's own language."""
    targets = re.findall(r"\]\(([^)]+)\)", FENCE.sub("", text))
    return ["#" if target.startswith("#") else target for target in targets]


def commands(text: str) -> list[str]:
    """The fenced blocks without what is for people: comments, and the words beside paths."""
    return [
        re.sub(r"[ ]{3,}.*|\s+#.*", "", block, flags=re.MULTILINE) for block in FENCE.findall(text)
    ]


def code(text: str) -> Counter[str]:
    """What stands between backticks."""
    return Counter(re.findall(r"`([^`\n]+)`", FENCE.sub("", text).replace("\n", " ")))


def test_the_chinese_readme_has_the_numbers_of_the_english_one():
    assert numbers(CHINESE) == numbers(ENGLISH)


def test_the_chinese_readme_has_the_links_of_the_english_one():
    assert links(ENGLISH)[0] == "README.zh.md"
    assert links(CHINESE)[0] == "README.md"
    assert links(CHINESE)[1:] == links(ENGLISH)[1:]


def test_the_chinese_readme_has_the_commands_of_the_english_one():
    assert commands(CHINESE) == commands(ENGLISH)
    assert code(CHINESE) == code(ENGLISH)


def test_the_table_of_decoding_is_what_the_benchmark_wrote():
    path = ROOT / "benchmarks" / "results" / "decode.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"]
    expected = [
        (
            f"{cells['transformers_static']['decode_tokens_per_second']:,.0f}",
            f"**{cells['ours']['decode_tokens_per_second']:,.0f}**",
            f"{100 * cells['ours']['share_of_floor']:.0f} %",
        )
        for model in models.values()
        for cells in model["batches"].values()
    ]
    row = r"^\| [\w. -]*\| \d+ \| ([\d,]+) \| (\*\*[\d,]+\*\*) \| (\d+ %) \|$"
    assert re.findall(row, ENGLISH, re.MULTILINE) == expected
    assert {model["device"] for model in models.values()} == {"NVIDIA H200"}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["english", "chinese"])
def test_what_a_readme_links_to_is_there(text: str):
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (ROOT / target.partition("#")[0]).exists(), target
