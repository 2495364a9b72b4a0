"""What the server takes from a caller, and that it says no in one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from apps.limits import Limits, Settings, check_dialogue, check_session, check_settings

LIMITS = Limits()


def turns(count: int) -> list[dict[str, Any]]:
    return [{"role": "assistant" if i % 2 else "user", "content": f"m{i}"} for i in range(count)]


def refused(error: pytest.ExceptionInfo[ValueError]) -> str:
    """The message, once it is one short sentence."""
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 200, text
    return text


def test_good_settings_come_through_as_plain_numbers():
    settings = check_settings(LIMITS, temperature=1, top_p=0.5, max_new_tokens=64.0, seed=7)
    assert settings == Settings(1.0, 0.5, 64, 7, 0)
    assert isinstance(settings.max_new_tokens, int) and isinstance(settings.temperature, float)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", 2.1, "the temperature must be a number from 0 to 2, not 2.1"),
        ("temperature", -0.1, "the temperature must be a number from 0 to 2, not -0.1"),
        ("temperature", math.nan, "the temperature must be a number from 0 to 2, not nan"),
        ("temperature", math.inf, "the temperature must be a number from 0 to 2, not inf"),
        ("temperature", "0.7", "the temperature must be a number from 0 to 2, not '0.7'"),
        ("temperature", None, "the temperature must be a number from 0 to 2, not None"),
        ("temperature", [1], "the temperature must be a number from 0 to 2, not a list"),
        ("temperature", True, "the temperature must be a number from 0 to 2, not True"),
        ("top_p", 0, "top-p must be a number from 0.01 to 1, not 0"),
        ("top_p", 1.01, "top-p must be a number from 0.01 to 1, not 1.01"),
        ("max_new_tokens", 0, "the length must be a whole number from 1 to 2048, not 0"),
        ("max_new_tokens", 2049, "the length must be a whole number from 1 to 2048, not 2049"),
        ("max_new_tokens", 1.5, "the length must be a whole number from 1 to 2048, not 1.5"),
        ("max_new_tokens", 10**300, "from 1 to 2048, not a huge number"),
        ("seed", -1, "the seed must be a whole number from 0 to 2147483647, not -1"),
        ("seed", 2**31, "the seed must be a whole number from 0 to 2147483647, not 2147483648"),
        ("attempt", {}, "the attempt must be a whole number from 0 to 2147483647, not a dict"),
    ],
)
def test_a_setting_out_of_range_or_of_another_type_is_refused(name, value, message):
    with pytest.raises(ValueError) as error:
        check_settings(LIMITS, **{name: value})
    assert message in refused(error)


def test_a_dialogue_begins_with_the_system_prompt():
    assert check_dialogue(LIMITS, turns(3), " be kind ") == (
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "m0"},
        {"role": "assistant", "content": "m1"},
        {"role": "user", "content": "m2"},
    )


def test_messages_as_gradio_gives_them_back_are_read():
    parts = [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}]
    message = {"role": "user", "content": parts, "metadata": None, "options": None}
    assert check_dialogue(LIMITS, [message]) == ({"role": "user", "content": "Hello there"},)


def test_an_exchange_without_an_answer_is_left_out():
    messages = turns(3)
    messages[1]["content"] = " "
    assert [m["content"] for m in check_dialogue(LIMITS, messages)] == ["m2"]


def test_lone_surrogates_become_the_replacement_character():
    (message,) = check_dialogue(LIMITS, [{"role": "user", "content": "a\ud800b"}])
    assert message["content"] == "a\ufffdb"


@pytest.mark.parametrize(
    ("messages", "system", "message"),
    [
        ([{"role": "user", "content": "x" * 1_000_000}], "", "may have 20,000 characters, not 1,0"),
        (turns(10_001), "", "may have 200 messages, not 10001; begin a new one"),
        (turns(1), "s" * 20_001, "the system prompt may have 20,000 characters"),
        ([], "", "write a message first"),
        ([{"role": "user", "content": " \n"}], "", "write a message first"),
        ("hello", "", "the messages must be a list"),
        (None, "", "the messages must be a list"),
        ({"role": "user"}, "", "the messages must be a list"),
        (["hello"], "", "user and assistant in turn"),
        (turns(2), "", "user and assistant in turn"),
        ([{"role": "system", "content": "x"}], "", "user and assistant in turn"),
        ([{"role": "user"}], "", "a message must be text"),
        ([{"role": "user", "content": 5}], "", "a message must be text"),
        ([{"role": "user", "content": [{"type": "file", "file": "/etc/passwd"}]}], "", "be text"),
        ([{"role": "user", "content": [{"path": "/etc/passwd"}]}], "", "a message must be text"),
        (turns(1), ["s"], "the system prompt must be text"),
    ],
)
def test_a_dialogue_beyond_the_limits_is_refused(messages, system, message):
    with pytest.raises(ValueError) as error:
        check_dialogue(LIMITS, messages, system)
    assert message in refused(error)


def test_all_messages_together_have_a_limit_too():
    messages = [{**m, "content": "x" * 20_000} for m in turns(11)]
    with pytest.raises(ValueError, match="may have 200,000 characters, not 220,000"):
        check_dialogue(LIMITS, messages)


@pytest.mark.parametrize("session", [None, "", 5, "x" * 201, ["s"]])
def test_a_session_is_a_short_text(session):
    with pytest.raises(ValueError, match="the session must be named by a short text"):
        check_session(session)
