"""A tokenizer made fit for dialogues, and text -> ids by one chat template and one contract.

The prompt and the response are tokenized apart and joined as ids, so that SFT, the reward model
and PPO see the very ids that generation samples: the response ends with EOS, PAD is never EOS.
Text in a dialogue that looks like a special token stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.trust import check_tokenizer_directory
from rlhf_kit.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
EOS, PAD = "<|eos|>", "<|pad|>"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
PRIVATE_USE = range(0xF0000, 0xFFFFE)
"""Code points that no text means anything by; they stand in for special tokens in contents."""


# The tokenizer -----------------------------------------------------------------------------


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a local directory, without touching the hub, or of a hub name.

    Raises:
        ValueError: the directory does not exist or holds no tokenizer, or the hub has none.
    """
    path = Path(name_or_path).expanduser()
    is_local = path.exists() or str(name_or_path).startswith((".", "/", "~")) or len(path.parts) > 2
    if is_local and not path.is_dir():
        raise ValueError(f"directory {name_or_path} does not exist")
    names = {file.name for file in path.iterdir()} if is_local else set()
    is_gpt2 = {"vocab.json", "merges.txt"} <= names  # the layout before tokenizer.json
    if is_local and not is_gpt2 and not names & TOKENIZER_FILES:
        raise ValueError(f"directory {name_or_path} holds no tokenizer (no tokenizer.json)")
    if is_local:
        check_tokenizer_directory(path)
    kind = GPT2Tokenizer if is_gpt2 and not names & {"config.json", *TOKENIZER_FILES} else None
    try:
        return (kind or AutoTokenizer).from_pretrained(
            str(path), local_files_only=is_local, trust_remote_code=False
        )
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust side is no Exception
        raise ValueError(
            f"the tokenizer in {name_or_path} cannot be read: {first_line(error)}"
            if is_local
            else f"{name_or_path} is no local directory, and the hub gave no tokenizer of that "
            "name; check the spelling, or download it and give the directory"
        ) from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class TokenizerReport:
    """What `prepare_tokenizer` changed."""

    added_template: bool
    added_eos: bool
    added_pad: bool
    size: int
    """`len(tokenizer)` now; the models' embeddings need at least this many rows."""

    def __str__(self) -> str:
        changed = [
            text
            for flag, text in (
                (self.added_template, "the kit's chat template"),
                (self.added_eos, f"the EOS token {EOS}"),
                (self.added_pad, f"the PAD token {PAD}"),
            )
            if flag
        ]
        return f"tokenizer of {self.size} tokens, added: {', '.join(changed) or 'nothing'}"


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> TokenizerReport:
    """Give it, in place, what every stage needs: a chat template, EOS, a PAD that is not EOS."""
    added_template = not tokenizer.chat_template
    if added_template:
        tokenizer.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    if added_eos := tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    added_pad = tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id
    if added_pad:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.padding_side = "left"
    return TokenizerReport(added_template, added_eos, added_pad, len(tokenizer))


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether a dialogue has the same ids in both, so that no text needs to be encoded anew."""
    return (
        one.get_vocab() == other.get_vocab()
        and one.eos_token == other.eos_token
        and one.chat_template == other.chat_template
    )


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> list[int]:
    """The ids that end a response: the tokenizer's EOS, then others that the model names."""
    generation = getattr(model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None)
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    return list(dict.fromkeys([cast(int, tokenizer.eos_token_id), *named]))


# Text -> ids --------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _pattern(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _pattern(frozenset(added | set(tokenizer.all_special_tokens)))


def _protect(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[dict[str, str]], dict[int, str]]:
    """Messages whose contents hold no special token, and the map that undoes it.

    A user may write "<|eos|>", and it must stay text. So each special token in a content is
    replaced by a private-use character that occurs nowhere else, the template is applied, the
    result is cut at the special tokens that are left, which are the template's own, and the
    text between them gets its original characters back and is encoded as text alone.
    """
    # The tokenizer takes no lone surrogates: they become U+FFFD, and pairs one character.
    contents = [
        message["content"].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for message in messages
    ]
    pattern = _special_tokens(tokenizer)
    everything = "".join(contents)
    found = sorted(set(pattern.findall(everything)))
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in everything)
    stand_in = dict(zip(found, free, strict=False))
    if found:
        contents = [pattern.sub(lambda hit: stand_in[hit[0]], content) for content in contents]
    turns = [
        {"role": message["role"], "content": content}
        for message, content in zip(messages, contents, strict=True)
    ]
    return turns, {ord(char): token for token, char in stand_in.items()}


class RefusedDialogue(ValueError):
    """The model's own template will not write a dialogue, such as two user turns in a row."""


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, generate: bool
) -> str:
    try:
        text = str(
            tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=generate
            )
        )
        text.encode("utf-8")  # a lone surrogate of the template's own
    except MemoryError:
        raise
    except Exception as error:  # its own refusal, or whatever its expressions run into
        reason = first_line(error)
        raise RefusedDialogue(f"the chat template refuses a dialogue: {reason}") from error
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, originals: dict[int, str]) -> list[int]:
    """Ids of a rendered text; see `_protect` for `originals`."""
    if not originals:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    as_tokens = set(_ids(tokenizer, originals.values()))
    ids: list[int] = []
    for i, part in enumerate(_special_tokens(tokenizer).split(text)):
        if i % 2:
            ids += _ids(tokenizer, [part])
            continue
        plain = part.translate(originals)
        if not plain:
            continue
        part_ids = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        if not as_tokens.isdisjoint(part_ids):
            raise ValueError(
                f"this tokenizer cannot write {' or '.join(originals.values())} as text; remove "
                "it from the data"
            )
        ids += part_ids
    return ids


def _ids(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[str]) -> list[int]:
    return cast("list[int]", tokenizer.convert_tokens_to_ids(list(tokens)))


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str:
    """The prompt as the template writes it, up to where the assistant begins to speak."""
    turns, originals = _protect(tokenizer, prompt)
    return _render(tokenizer, turns, generate=True).translate(originals)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """The ids of `render_prompt`; what looks like a special token in a content stays text."""
    turns, originals = _protect(tokenizer, prompt)
    return _encode(tokenizer, _render(tokenizer, turns, generate=True), originals)


def encode_response(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], response: str
) -> list[int]:
    """The ids of what the template writes after `render_prompt`, the last of them EOS.

    What the template writes after its own EOS (often a newline) belongs to the next turn and is
    cut; where it writes no EOS, one is appended.

    Raises:
        ValueError: the template does not continue its own generation prompt.
    """
    answered = [*prompt, Message(role="assistant", content=response)]
    turns, originals = _protect(tokenizer, answered)
    head = _render(tokenizer, turns[:-1], generate=True)
    full = _render(tokenizer, turns, generate=False)
    if not full.startswith(head):
        raise ValueError(
            "the chat template does not continue its own generation prompt: what it writes for "
            "an answered dialogue does not begin with what it writes for the prompt"
        )
    eos = str(tokenizer.eos_token)
    tail = full[len(head) :]
    text = tail[: tail.rindex(eos)] if eos in tail else tail
    return _encode(tokenizer, text + eos, originals)


def decode_response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> str:
    """The text of a response, without special tokens and outer space."""
    text = tokenizer.decode(
        list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return str(text).strip()
