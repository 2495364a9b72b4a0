"""Talk to a trained model in the terminal: streaming, many turns, the model's own template.

`ChatSession` is the dialogue; `talk` puts a terminal or a pipe around it. Models are read from
local directories alone: safetensors, no pickles, no code of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_kit.config import GenerationConfig, require
from rlhf_kit.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from rlhf_kit.hybrid_engine.decode import Decoder

Stream = Callable[..., Iterator[Any]]
"""`Decoder.stream`: (input_ids, generation, seed=...) -> tokens with an `id`."""
ACTORS = ("sft", "final", "ema")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a model must not send to a terminal: escape sequences can rewrite the screen."""
HELP = """\
/reset          forget the dialogue
/system TEXT    begin a new dialogue with this system message; without TEXT, with none
/help           this list
/quit           leave; Ctrl-D does too
Ctrl-C          stop the answer; at the prompt, twice: leave"""


class ChatSession:
    """A dialogue that stays within the model's context."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stream: Stream,
        *,
        context: int,
        generation: GenerationConfig,
        seed: int = 0,
        system: str = "",
    ) -> None:
        self.tokenizer = tokenizer
        self.stream = stream
        self.context = context
        """Tokens that prompt and answer may take together."""
        self.generation = generation
        self.seed = seed
        self.answers = 0
        self.dropped = 0
        """Messages that the last reply left out, the oldest, for want of room."""
        self.tokens = 0
        """Tokens of the last answer."""
        self.reset(system)

    def reset(self, system: str = "") -> None:
        """Begin a new dialogue."""
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []

    def reply(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece, each whole characters.

        Closed early, the dialogue keeps the answer as far as it came. ValueError where `text`
        alone is too long.
        """
        from tokenizers.decoders import DecodeStream

        from rlhf_kit.distributed import derive_seed
        from rlhf_kit.tokenization import decode_response

        question: Message = {"role": "user", "content": text}
        prompt = self._fit(question)
        room = min(self.generation.max_new_tokens, self.context - len(prompt))
        minimum = min(self.generation.min_new_tokens, room)
        generation = replace(self.generation, max_new_tokens=room, min_new_tokens=minimum)
        seed = derive_seed(self.seed, "chat", self.answers)
        ids: list[int] = []
        self.tokens, started = 0, False
        self.answers += 1
        characters = DecodeStream(skip_special_tokens=True)
        try:
            for token in self.stream(prompt, generation, seed=seed):
                ids.append(token.id)
                self.tokens = len(ids)
                piece = characters.step(self.tokenizer.backend_tokenizer, token.id) or ""
                if not started:  # a template's space before the answer
                    piece = piece.lstrip()
                    started = bool(piece)
                if piece:
                    yield piece
        finally:
            answer = decode_response(self.tokenizer, ids)
            if answer:
                self.messages += [question, {"role": "assistant", "content": answer}]

    def _fit(self, question: Message) -> list[int]:
        """The prompt's ids; the oldest turns leave until half the room for an answer is free."""
        from rlhf_kit.tokenization import encode_prompt

        self.dropped = 0
        wanted = min(self.generation.max_new_tokens, self.context // 2)
        while True:
            ids = encode_prompt(self.tokenizer, [*self.system, *self.messages, question])
            if len(ids) + wanted <= self.context:
                return ids
            require(
                bool(self.messages),
                f"the message takes {len(ids)} tokens with its template, but only "
                f"{self.context - wanted} of the model's {self.context} are free for it: "
                "shorten it",
            )
            del self.messages[:2]
            self.dropped += 2


# ---- finding and loading a model


def find_model(directory: str | Path, checkpoint: str | None) -> Path:
    """The model directory that DIR, a model or a run, and a checkpoint's name stand for."""
    from rlhf_kit.pipeline import EXPORTS, read_record

    directory = Path(directory)
    require(directory.is_dir(), f"there is no directory {directory}")
    there = [name for name in ACTORS if (directory / EXPORTS[name] / "config.json").is_file()]
    if (directory / "config.json").is_file():
        require(checkpoint is None, f"{directory} is one model: leave out --checkpoint")
        return directory
    require(
        bool(there) or (directory / "run.json").is_file(),
        f"{directory} holds neither a model (config.json) nor a run (run.json)",
    )
    if checkpoint == "base":
        return local_model(read_record(directory)["config"]["actor_model"])
    name = checkpoint or "final"
    require(
        name in there,
        f"{directory} has no {EXPORTS[name]} yet; "
        + (f"try --checkpoint {there[-1]}" if there else "no stage is done"),
    )
    return directory / EXPORTS[name]


def local_model(name: str) -> Path:
    """The directory of a base model, without asking the network for it."""
    from huggingface_hub import snapshot_download

    from rlhf_kit.models import resolve_model

    path = resolve_model(name)
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception as error:
        raise ValueError(f"the base model {name} is not on this machine") from error


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, ready to answer."""

    tokenizer: PreTrainedTokenizerFast
    decoder: Decoder
    context: int
    """Tokens that prompt and answer may take together."""


def load_model(directory: Path) -> LoadedModel:
    """The model in `directory` on this process' device; ValueError where it is not one."""
    from rlhf_kit.distributed import local_device
    from rlhf_kit.hybrid_engine.decode import Decoder
    from rlhf_kit.models import load_causal_lm
    from rlhf_kit.tokenization import load_tokenizer, prepare_tokenizer

    device = local_device()
    tokenizer = load_tokenizer(directory)
    prepare_tokenizer(tokenizer)
    try:
        dtype = "bf16" if device.type == "cuda" else "fp32"
        model = load_causal_lm(str(directory), tokenizer, dtype=dtype)
    except OSError as error:
        sentence = str(error).partition("\n")[0]
        raise ValueError(f"{directory} holds no model that can be read: {sentence}") from error
    model.to(device).eval()  # type: ignore[arg-type]
    eos = [tokenizer.eos_token_id, *_eos_of(directory)]
    assert isinstance(tokenizer.pad_token_id, int)
    decoder = Decoder(model, eos_token_ids=eos, pad_token_id=tokenizer.pad_token_id)
    limits = [tokenizer.model_max_length]
    limits.append(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2048)
    return LoadedModel(tokenizer, decoder, min(limits))


def load_session(
    directory: Path, *, generation: GenerationConfig, seed: int, system: str
) -> ChatSession:
    """A session with the model in `directory`; ValueError where it is not one."""
    loaded = load_model(directory)
    return ChatSession(
        loaded.tokenizer,
        loaded.decoder.stream,
        context=loaded.context,
        generation=generation,
        seed=seed,
        system=system,
    )


def _eos_of(directory: Path) -> list[int]:
    """The tokens at which the model's own generation_config.json ends an answer."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    ids = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return ids if isinstance(ids, list) else [ids] if isinstance(ids, int) else []


# ---- the terminal


def talk(
    directory: str | Path,
    *,
    checkpoint: str | None = None,
    generation: GenerationConfig,
    seed: int = 0,
    system: str = "",
) -> int:
    """Chat until /quit or the end of the input; the exit code."""
    path = find_model(directory, checkpoint)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        print(f"Loading {path} ...", flush=True)
    session = load_session(path, generation=generation, seed=seed, system=system)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if not terminal:
        for line in sys.stdin:
            if not step(session, line.strip(), terminal=False):
                break
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() gains history and editing)
    print(f"{session.context} tokens of context; /help lists the commands.")
    interrupts = 0
    while interrupts < 2:
        try:
            line = input("> ")
            interrupts = 0
            if not step(session, line.strip(), terminal=True):
                break
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
        except EOFError:
            print()
            break
        except KeyboardInterrupt:
            interrupts += 1
            print("\n(Ctrl-C again leaves)" if interrupts == 1 else "\n(left)")
    return 0


def step(session: ChatSession, line: str, *, terminal: bool) -> bool:
    """Obey or answer one line; False to leave."""
    command, _, text = line.partition(" ")
    if command == "/quit":
        return False
    if command == "/help":
        print(HELP)
    elif command in ("/reset", "/system"):
        keep = session.system[0]["content"] if session.system else ""
        session.reset(keep if command == "/reset" else text.strip())
        print("(a new dialogue)")
    elif command.startswith("/"):
        print(f"(there is no {command}; /help lists the commands)")
    elif line:
        answer(session, line, terminal=terminal)
    return True


def answer(session: ChatSession, line: str, *, terminal: bool) -> None:
    begin = time.perf_counter()
    with contextlib.closing(session.reply(line)) as pieces:
        for number, piece in enumerate(pieces):
            if number == 0 and session.dropped:
                remark(f"the oldest {session.dropped} messages no longer fit", terminal=terminal)
            print(CONTROL.sub("", piece), end="", flush=True)
    print(flush=True)
    if terminal:
        rate = session.tokens / (time.perf_counter() - begin)
        remark(f"{session.tokens} tokens, {rate:.1f} tokens/s", terminal=True)


def remark(text: str, *, terminal: bool) -> None:
    """A line beside the dialogue: dim in a terminal, on stderr where answers are piped on."""
    if not terminal:
        print(f"({text})", file=sys.stderr)
    elif os.environ.get("NO_COLOR"):
        print(f"({text})")
    else:
        print(f"\x1b[2m({text})\x1b[0m")
