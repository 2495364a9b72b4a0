"""The terminal chat: the dialogue with a scripted decoder, the terminal with a tiny model."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_kit import chat
from rlhf_kit.chat import ChatSession, find_model
from rlhf_kit.config import GenerationConfig
from rlhf_kit.tokenization import encode_prompt

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that most characters are several tokens."""
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", model_max_length=4096
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Token(NamedTuple):
    id: int


class Script:
    """A decoder that says the next line of a script, and remembers what it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *lines: str) -> None:
        self.tokenizer = tokenizer
        self.lines = list(lines)
        self.calls: list[tuple[list[int], GenerationConfig, int]] = []

    def stream(self, input_ids, generation, *, seed):
        self.calls.append((list(input_ids), generation, seed))
        ids = self.tokenizer(self.lines.pop(0), add_special_tokens=False)["input_ids"]
        for id in [*ids, self.tokenizer.eos_token_id]:
            yield Token(id)

    def prompts(self) -> list[str]:
        return [self.tokenizer.decode(ids) for ids, _, _ in self.calls]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def session(script: Script, *, context: int = 1000, new: int = 10, **keywords) -> ChatSession:
    generation = GenerationConfig(max_new_tokens=new, slots=1)
    return ChatSession(
        script.tokenizer, script.stream, context=context, generation=generation, **keywords
    )


# ---- the dialogue


def test_a_dialogue_goes_through_the_models_template(tokenizer):
    script = Script(tokenizer, "hello", "fine")
    talk = session(script, system="be kind")
    assert "".join(talk.reply("hi")) == "hello"
    assert "".join(talk.reply("how are you?")) == "fine"
    assert script.prompts() == [
        "<s>be kind<u>hi<a>",
        "<s>be kind<u>hi<a>hello<eos><u>how are you?<a>",
    ]
    assert talk.tokens == 5  # f, i, n, e and EOS


def test_characters_of_several_tokens_come_whole(tokenizer):
    text = "n\u00e9e \U0001f600 \u6f22!"
    pieces = list(session(Script(tokenizer, text)).reply("hi"))
    assert pieces == list(text)


def test_the_templates_space_before_an_answer_is_not_shown(tokenizer):
    talk = session(Script(tokenizer, "  well, yes "))
    assert "".join(talk.reply("hi")) == "well, yes "
    assert talk.messages[-1]["content"] == "well, yes"


def test_the_oldest_turns_leave_when_the_context_is_full(tokenizer):
    # a turn is <u> + 10 + <a> + 10 + EOS = 27 tokens, the question with its prompt 16
    script = Script(tokenizer, *["a" * 10] * 4)
    talk = session(script, context=80, new=10)
    dropped = []
    for _ in range(4):
        list(talk.reply("q" * 10))
        dropped.append(talk.dropped)
    assert dropped == [0, 0, 0, 2]  # 16, 43 and 70 tokens and 10 for the answer are 80
    assert script.prompts()[3] == script.prompts()[2]
    assert len(talk.messages) == 6


def test_a_message_that_cannot_fit_is_refused_and_the_dialogue_stays(tokenizer):
    script = Script(tokenizer, "yes", "no")
    talk = session(script, context=80)
    list(talk.reply("hi"))
    with pytest.raises(ValueError, match="takes 106 tokens with its template, but only 70 of the"):
        list(talk.reply("x" * 100))
    assert len(script.calls) == 1


def test_the_answer_gets_what_room_there_is(tokenizer):
    script = Script(tokenizer, "yes")
    list(session(script, context=80, new=256).reply("x" * 20))
    ids, generation, _ = script.calls[0]
    assert len(ids) + generation.max_new_tokens == 80


def test_a_stopped_answer_stays_in_the_dialogue_as_far_as_it_came(tokenizer):
    script = Script(tokenizer, "hello there", "yes", "")
    talk = session(script)
    pieces = talk.reply("hi")
    assert [next(pieces) for _ in range(5)] == list("hello")
    pieces.close()
    assert [m["content"] for m in talk.messages] == ["hi", "hello"]
    list(talk.reply("go on"))
    assert script.prompts()[1] == "<u>hi<a>hello<eos><u>go on<a>"


def test_answers_differ_by_turn_and_agree_by_seed(tokenizer):
    seeds = []
    for seed in (1, 1, 2):
        script = Script(tokenizer, "a", "b")
        talk = session(script, seed=seed)
        list(talk.reply("hi"))
        list(talk.reply("hi"))
        seeds.append([seed for _, _, seed in script.calls])
    assert seeds[0] == seeds[1] and len({*seeds[0], *seeds[2]}) == 4


def test_commands_change_the_dialogue_and_reach_no_model(tokenizer, capsys):
    script = Script(tokenizer, "one", "two", "three")
    talk = session(script, system="old")
    assert chat.step(talk, "hi", terminal=False)
    assert chat.step(talk, "/system new rules", terminal=False)
    assert chat.step(talk, "hi", terminal=False)
    assert chat.step(talk, "/reset", terminal=False)
    assert chat.step(talk, "hi", terminal=False)
    assert chat.step(talk, "", terminal=False) and chat.step(talk, "/help", terminal=False)
    assert chat.step(talk, "/dance", terminal=False)
    assert not chat.step(talk, "/quit", terminal=False)
    assert script.prompts() == ["<s>old<u>hi<a>", *["<s>new rules<u>hi<a>"] * 2]
    out = capsys.readouterr().out
    assert "one\n" in out and "Ctrl-D" in out and "there is no /dance" in out


def test_a_model_cannot_send_escape_sequences_to_the_terminal(tokenizer, capsys):
    chat.answer(session(Script(tokenizer, "a\x1b[2Jb\tc\nd")), "hi", terminal=False)
    assert capsys.readouterr().out == "a[2Jb\tc\nd\n"


def test_what_left_the_context_is_said(tokenizer, capsys):
    talk = session(Script(tokenizer, *["a" * 10] * 2), context=50)
    for _ in range(2):
        chat.answer(talk, "q" * 10, terminal=False)
    assert capsys.readouterr().err == "(the oldest 2 messages no longer fit)\n"


# ---- finding a model


def test_a_runs_models_are_found_by_name(tmp_path: Path):
    (tmp_path / "run.json").write_text("{}")
    for part in ("sft/final", "ppo/final"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "config.json").write_text("{}")
    assert find_model(tmp_path, None) == tmp_path / "ppo" / "final"
    assert find_model(tmp_path, "sft") == tmp_path / "sft" / "final"
    with pytest.raises(ValueError, match="has no ppo/ema yet; try --checkpoint final"):
        find_model(tmp_path, "ema")
    with pytest.raises(ValueError, match="is one model: leave out --checkpoint"):
        find_model(tmp_path / "sft" / "final", "ema")
    (tmp_path / "run.json").unlink()  # notebooks run by hand leave none
    sft = find_model(tmp_path, "sft")
    assert find_model(sft, None) == sft
    with pytest.raises(ValueError, match="holds neither a model"):
        find_model(tmp_path / "ppo", None)


def test_the_base_model_of_a_run_is_not_asked_for_on_the_network(tmp_path: Path):
    record = {"config": {"actor_model": "nobody/no-model"}, "stages": {}, "finished": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="nobody/no-model is not on this machine"):
        find_model(tmp_path, "base")


# ---- a terminal and a pipe


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory) -> Path:
    """A random model that, sampled greedily, talks in letters and never ends by itself."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    letters = [i for i, char in enumerate(BYTES) if char in "abcdefghijklmnopqrstuvwxyz"]
    mute = [i for i in range(len(tokenizer)) if i not in letters]
    model.lm_head.weight.data[mute] = 0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def command(directory: Path, *words: str) -> list[str]:
    code = "import sys; from rlhf_kit import cli; sys.exit(cli.main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "chat", str(directory), "--temperature=0", *words]


def test_ctrl_c_stops_the_answer_and_then_the_program(model_directory: Path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command(model_directory, "--max-new-tokens=4000"),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        close_fds=True,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        env={**os.environ, "TERM": "dumb", "NO_COLOR": ""},
    )
    os.close(theirs)
    screen = ""

    def wait_for(text: str, *, key: bytes = b"") -> None:
        """Read until `text`; press `key` now, and again where nothing came of it.

        A Ctrl-C in the instant in which input() begins to wait is noticed at the next key only.
        """
        nonlocal screen
        pressed = 0.0
        deadline = time.monotonic() + 60
        while text not in screen:
            assert time.monotonic() < deadline, screen
            if key and time.monotonic() > pressed + 3:
                pressed = time.monotonic()
                os.write(ours, key)
            if select.select([ours], [], [], 0.1)[0]:
                screen += os.read(ours, 65536).decode(errors="replace")
        screen = screen.partition(text)[2]

    wait_for("4096 tokens of context")
    wait_for("> ")
    os.write(ours, b"hi\r")
    wait_for("hi\r\n")
    while sum(char.isalpha() for char in screen) < 5:  # the answer has begun
        screen += os.read(ours, 65536).decode(errors="replace")
    os.write(ours, b"\x03")
    wait_for("> ")
    assert process.poll() is None
    os.write(ours, b"/reset\r")
    wait_for("(a new dialogue)")
    wait_for("> ")
    wait_for("(Ctrl-C again leaves)", key=b"\x03")
    wait_for("> ")
    wait_for("(left)", key=b"\x03")
    assert process.wait(timeout=30) == 0
    os.close(ours)


def test_piped_lines_are_answered_one_by_one(model_directory: Path):
    done = subprocess.run(
        command(model_directory, "--max-new-tokens=6"),
        input="hi\n\n/reset\nhi\n/quit\nnever\n",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, note, second = done.stdout.splitlines()
    assert note == "(a new dialogue)" and first == second and first.isalpha() and len(first) == 6


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_half_a_model_is_refused_in_one_sentence(model_directory, tmp_path, capsys, missing):
    from rlhf_kit import cli

    for path in model_directory.iterdir():
        if path.name != missing and not path.name.startswith(missing.partition(".")[0]):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert cli.main(["chat", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and str(tmp_path) in err


def test_the_prompt_is_the_one_that_training_sees(tokenizer):
    script = Script(tokenizer, "x")
    list(session(script).reply("write <eos> please"))
    message = {"role": "user", "content": "write <eos> please"}
    assert script.calls[0][0] == encode_prompt(tokenizer, [message])
    assert tokenizer.eos_token_id not in script.calls[0][0]
