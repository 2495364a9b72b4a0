"""`rlhf-kit data check`: what a file of one's own holds, before a run is started with it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from statistics import median

from tqdm.auto import tqdm
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_kit.blending import held_out, split_of
from rlhf_kit.config import DataConfig, require
from rlhf_kit.data_preview import visible
from rlhf_kit.datasets import TOY_WORLD, Report, numbered_pairs
from rlhf_kit.distributed import is_main_rank
from rlhf_kit.split_manifest import normalised
from rlhf_kit.tokenization import RefusedDialogue, encode_prompt, encode_response
from rlhf_kit.types import STAGES, PreferencePair

GOOD, FINDINGS, UNUSABLE = 0, 1, 2
"""Exit codes: nothing to say; usable, with something to say; not one row can be used."""
MANY = 0.05
"""A share of rows dropped or cut for their length that is worth a warning."""
LONGER = 0.7
"""A share of pairs whose chosen response is the longer one, from which a reward model may learn
length instead of quality."""
BIN_EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass
class Checked:
    """What was found in one source."""

    name: str
    report: Report
    rows: int = 0
    """Rows that can be used, at least as prompts."""
    stages: Counter[str] = field(default_factory=Counter)
    """Rows that serve a stage, before the splits."""
    splits: Counter[str] = field(default_factory=Counter)
    """Rows that each stage would get, and `<stage> evaluation` for those held out of them."""
    equal: list[str] = field(default_factory=list)
    """Places of rows that are equal to an earlier one."""
    opposite: list[str] = field(default_factory=list)
    """Places of pairs that an earlier row has the other way round."""
    prompts: set[int] = field(default_factory=set)
    """Hashes of the prompts."""
    near: set[int] = field(default_factory=set)
    """The same, case and spaces apart."""
    as_text: list[str] = field(default_factory=list)
    """Places of prompts that hold a dialogue as text, read as one turn."""
    refused_by_template: list[str] = field(default_factory=list)
    longer: int = 0
    """Pairs whose chosen response has more tokens."""
    prompt_lengths: array[int] = field(default_factory=lambda: array("l"))
    lengths: array[int] = field(default_factory=lambda: array("l"))
    """Tokens of the prompts, and of prompt and longest response together."""


def _hash(*parts: str | None) -> int:
    joined = "\0".join(part or "" for part in parts).encode()
    return int.from_bytes(blake2b(joined, digest_size=8).digest(), "little")


def check_source(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    rows: int | None = None,
) -> Checked:
    """Read a source as a run would, at most `rows` of it, and count what is remarkable.

    Raises:
        ValueError: it cannot be read, or no row of it can be used.
    """
    require(name != TOY_WORLD, f"{TOY_WORLD} is generated: there is no file to check")
    checked = Checked(name, Report(name))
    seen: set[int] = set()
    pairs = numbered_pairs(name, "ppo", checked.report, rows=rows)
    for place, pair in tqdm(pairs, desc="check", delay=2, disable=not is_main_rank()):
        checked.rows += 1
        _count_contents(checked, place, pair, seen, config)
        _count_tokens(checked, place, pair, tokenizer)
    return checked


def _count_contents(
    checked: Checked, place: str, pair: PreferencePair, seen: set[int], config: DataConfig
) -> None:
    prompt_id = pair.prompt_id
    text = "\n".join(f"{message['role']}: {message['content']}" for message in pair.prompt)
    checked.prompts.add(int(prompt_id[:16], 16))
    checked.near.add(_hash(normalised(text)))
    row, other = _hash(prompt_id, pair.chosen, pair.rejected), None
    if pair.rejected is not None:
        other = _hash(prompt_id, pair.rejected, pair.chosen)
    if row in seen:
        checked.equal.append(place)
    elif other in seen:
        checked.opposite.append(place)
    seen.add(row)
    last = pair.prompt[-1]["content"]
    if "\nAssistant:" in last or "\nHuman:" in last or "<|im_start|>" in last:
        checked.as_text.append(place)
    stage = split_of(prompt_id, config.split)
    part = f"{stage} evaluation" if held_out(prompt_id, config.eval_share) else stage
    serves = {"sft": pair.chosen, "reward": pair.chosen and pair.rejected, "ppo": "prompt"}
    checked.stages.update(stage for stage in STAGES if serves[stage])
    checked.splits[part] += bool(serves[stage])


def _count_tokens(
    checked: Checked, place: str, pair: PreferencePair, tokenizer: PreTrainedTokenizerBase
) -> None:
    try:
        prompt = len(encode_prompt(tokenizer, pair.prompt))
        responses = [
            len(encode_response(tokenizer, pair.prompt, text)) if text else 0
            for text in (pair.chosen, pair.rejected)
        ]
    except RefusedDialogue:
        checked.refused_by_template.append(place)
        return
    checked.prompt_lengths.append(prompt)
    checked.lengths.append(prompt + max(responses))
    checked.longer += pair.rejected is not None and responses[0] > responses[1]


def findings(checked: Checked, config: DataConfig) -> list[str]:
    """What should be looked at before a run, one sentence each; none where all is well."""
    found = [
        f"{_rows(count)} refused: {reason} ({_listed(checked.report.places[reason], count)})"
        for reason, count in checked.report.refused.items()
    ]
    for places, what in (
        (checked.equal, "equal to an earlier row: it counts that often"),
        (checked.opposite, "opposite to an earlier row, with chosen and rejected exchanged"),
        (checked.as_text, "with a dialogue as text inside a prompt, read as one turn of the user"),
        (checked.refused_by_template, "dropped in a run: the chat template refuses the dialogue"),
    ):
        if places:
            found.append(f"{_rows(len(places))} {what} ({_listed(places, len(places))})")
    if near := len(checked.prompts) - len(checked.near):
        found.append(f"{near} prompts differ from another in case or spaces alone")
    n = max(len(checked.lengths), 1)
    long = sum(length > config.max_prompt_length for length in checked.prompt_lengths)
    cut = sum(length > config.max_length for length in checked.lengths)
    if long / n > MANY:
        found.append(
            f"{long / n:.0%} of the prompts are longer than data.max_prompt_length "
            f"{config.max_prompt_length}: a run drops these rows"
        )
    if cut / n > MANY:
        found.append(
            f"{cut / n:.0%} of the rows are longer than data.max_length {config.max_length}: "
            "a run cuts their responses, or drops them with their prompt"
        )
    pairs = checked.stages["reward"]
    if pairs >= 20 and checked.longer / pairs > LONGER:
        found.append(
            f"the chosen response is the longer one in {checked.longer / pairs:.0%} of the pairs: "
            "a reward model may learn length instead of quality"
        )
    for stage in STAGES:
        share = config.split[STAGES.index(stage)]
        if checked.stages[stage] and share and not checked.splits[stage]:
            found.append(
                f"stage {stage} would get no row: give more data, or raise its share in data.split"
            )
    return found


def _rows(count: int) -> str:
    return f"{count:,} row{'s' if count > 1 else ''}"


def _listed(places: list[str], count: int) -> str:
    """'line 3, 7, 9 ...': the word once, where all have the same."""
    first = places[:5]
    words = {place.rpartition(" ")[0] for place in first}
    if len(words) == 1:
        (word,) = words
        first = [f"{word} {', '.join(place.rpartition(' ')[2] for place in first)}"]
    return ", ".join(first) + (" ..." if count > 5 else "")


def describe(checked: Checked, config: DataConfig) -> list[str]:
    """The lines that `rlhf-kit data check` prints for one source, findings included."""
    report = checked.report
    serves = ", ".join(f"{stage} {checked.stages[stage]:,}" for stage in STAGES)
    gets = ", ".join(
        f"{stage} {checked.splits[stage]:,} + {checked.splits[f'{stage} evaluation']:,} held out"
        for stage in STAGES
    )
    lines = [
        visible(checked.name),
        f"  rows     {report.read:,} read, {checked.rows:,} usable; "
        f"{len(checked.prompts):,} distinct prompts",
        f"  serves   {serves}",
        f"  splits   {gets}  (data.split {':'.join(f'{share:g}' for share in config.split)})",
    ]
    lengths = {"prompts": checked.prompt_lengths, "rows": checked.lengths}
    limits = {"prompts": config.max_prompt_length, "rows": config.max_length}
    for name, values in lengths.items():
        if values:
            over = sum(value > limits[name] for value in values) / len(values)
            lines.append(
                f"  tokens   {name}: median {median(values):.0f}, longest {max(values):,}; "
                f"{over:.1%} over {limits[name]}"
            )
    lines += histogram(checked.lengths)
    return lines + [f"  finding  {visible(finding)}" for finding in findings(checked, config)]


def histogram(values: Iterable[int], width: int = 40) -> list[str]:
    """One line for each range of tokens that any row falls into, or that lies between such."""
    edges = (*BIN_EDGES, 1 << 62)
    counts = [0] * (len(edges) - 1)
    for value in values:
        counts[next(i for i, edge in enumerate(edges[1:]) if value < edge)] += 1
    filled = [i for i, count in enumerate(counts) if count]
    lines = []
    for i in range(min(filled, default=0), max(filled, default=-1) + 1):
        upper = "and more" if i + 2 == len(edges) else f"to {edges[i + 1] - 1}"
        bar = "#" * -(-counts[i] * width // max(counts))
        lines.append(f"           {edges[i]:>5} {upper:8s} {bar} {counts[i]:,}")
    return lines


def shared_prompts(sources: list[Checked]) -> int:
    """Prompts that stand in more than one of the sources."""
    counts = Counter(chain.from_iterable(checked.prompts for checked in sources))
    return sum(count > 1 for count in counts.values())


def run(
    names: list[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig, rows: int | None
) -> int:
    """Check and print each source; the exit code of the command."""
    code, sources = GOOD, list[Checked]()
    for name in dict.fromkeys(names):
        try:
            checked = check_source(name, tokenizer, config, rows)
        except ValueError as error:
            print(f"{visible(name)}\n  unusable {visible(str(error))}")
            code = UNUSABLE
            continue
        print("\n".join(describe(checked, config)))
        code = max(code, FINDINGS if findings(checked, config) else GOOD)
        sources.append(checked)
    if len(sources) > 1:
        print(f"{shared_prompts(sources):,} prompts are in more than one of these sources")
    verdict = ("good", "usable; look at the findings", "not usable as it is")[code]
    print(f"verdict: {verdict} (exit code {code})")
    return code
