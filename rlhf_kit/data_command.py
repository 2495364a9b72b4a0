"""The commands `rlhf-kit data check` and `rlhf-kit data preview`: own data, before a run."""

from __future__ import annotations

import argparse
import dataclasses
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_kit.config import DataConfig, SourceConfig, require
from rlhf_kit.hub_datasets import local_path
from rlhf_kit.types import STAGES

EXIT_CODES = (
    "Exit codes: 0 every row can be used, 1 usable with findings, 2 unusable. FILE is a file of "
    "JSON lines, JSON, CSV or Parquet, a directory of them, a dataset on the hub, or a Python "
    "function that yields rows (file.py:function, module:function)."
)


def add(command: Callable[..., argparse.ArgumentParser], among: Any) -> None:
    """Give the parser of `rlhf-kit data` its commands."""
    check = command(
        "check",
        data_check,
        "what data holds, and what a run would refuse",
        among=among,
        epilog=EXIT_CODES,
    )
    check.add_argument("sources", metavar="FILE", nargs="+", help="as train takes it in --data")
    check.add_argument(
        "--output", metavar="FILE", type=Path, help="write what the splits hold and share here"
    )
    preview = command(
        "preview", data_preview, "rows as a model reads them, and what it learns", among=among
    )
    preview.add_argument("source", metavar="FILE", help="as train takes it in --data")
    preview.add_argument("--stage", choices=STAGES, help="default: the last that a row serves")
    for sub, rows in ((check, None), (preview, 3)):
        sub.add_argument(
            "--rows", type=int, metavar="N", default=rows, help=f"at most ({rows or 'all'})"
        )
        sub.add_argument(
            "--tokenizer", metavar="M", default="toy_world", help="of this model (toy_world)"
        )
        sub.add_argument("--max-prompt-length", type=int, metavar="N", help="in tokens (256)")
        sub.add_argument("--max-length", type=int, metavar="N", help="of a whole row (512)")


def source_config(text: str) -> SourceConfig:
    """`name[=weight]`; a file whose own name has a = in it is taken as it is."""
    name, equals, weight = text.rpartition("=")
    if not equals or local_path(text):
        return SourceConfig(text)
    try:
        return SourceConfig(name, weight=float(weight))
    except ValueError as error:
        message = f"the weight of data source {name} must be a positive number, not {weight!r}"
        raise ValueError(message) from error


def _config(arguments: argparse.Namespace) -> DataConfig:
    """The lengths that the command line names, in an otherwise plain configuration."""
    rows = arguments.rows
    require(rows is None or rows > 0, f"--rows must be at least 1, not {rows}")
    given = {name: getattr(arguments, name) for name in ("max_prompt_length", "max_length")}
    return DataConfig(**{name: value for name, value in given.items() if value is not None})


def _tokenizer(name: str) -> Any:
    from rlhf_kit.models import resolve_model
    from rlhf_kit.tokenization import load_tokenizer, prepare_tokenizer

    # A row may hold any text; what this terminal cannot show is spelled out.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    tokenizer = load_tokenizer(resolve_model(name))
    prepare_tokenizer(tokenizer)
    tokenizer.model_max_length = 1 << 62  # lengths are what is asked for: no warnings about them
    return tokenizer


def data_check(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    sources = tuple(source_config(text) for text in arguments.sources)
    tokenizer = _tokenizer(arguments.tokenizer)

    from rlhf_kit.data_check import UNUSABLE, run

    code = run([source.name for source in sources], tokenizer, config, arguments.rows)
    if arguments.output and code != UNUSABLE:
        from rlhf_kit.split_manifest import write_manifest

        write_manifest(dataclasses.replace(config, sources=sources), arguments.output)
    return code


def data_preview(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    tokenizer = _tokenizer(arguments.tokenizer)

    from rlhf_kit.data_preview import preview, wants_colour

    for line in preview(
        source_config(arguments.source).name,
        tokenizer,
        config,
        rows=arguments.rows,
        stage=arguments.stage,
        colour=wants_colour(sys.stdout),
    ):
        print(line)
    return 0
