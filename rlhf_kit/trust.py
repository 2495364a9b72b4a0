"""What a model directory must look like before anything in it is loaded.

A directory that somebody else made may hold code: pickled weights, Python files, an `auto_map`,
a kernel fetched by name. Only JSON, text and safetensors are read here, each up to a size, and
nothing of it is run. SECURITY.md says what this defends against and what it does not.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_kit.config import require
from rlhf_kit.integrity import sha256

MEBIBYTE = 1 << 20
SIZES = {
    "config.json": 4 * MEBIBYTE,
    "generation_config.json": MEBIBYTE,
    "tokenizer_config.json": 16 * MEBIBYTE,
    "special_tokens_map.json": 16 * MEBIBYTE,
    "added_tokens.json": 64 * MEBIBYTE,
    "model.safetensors.index.json": 64 * MEBIBYTE,
    "export.json": 16 * MEBIBYTE,
}
"""The JSON files that are parsed here, and the largest size of each in bytes."""
TEXT_SIZES = {
    "chat_template.jinja": MEBIBYTE // 4,
    "tokenizer.json": 256 * MEBIBYTE,
    "tokenizer.model": 256 * MEBIBYTE,
    "vocab.json": 256 * MEBIBYTE,
    "merges.txt": 256 * MEBIBYTE,
}
"""Files that are passed on unparsed, and the largest size of each in bytes."""
HEADER_SIZE = 64 * MEBIBYTE
"""Of a safetensors file; 100,000 tensors need about 12 MiB."""
MAX_PARAMETERS = 1_000_000_000_000
MAX_FILES = 10_000
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".h5", ".msgpack")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Private keys that transformers itself has written into configurations, all without effect on
# what is imported; any other is refused, CVE-2026-4372 came in by one.
HARMLESS_KEYS = {
    "_attn_implementation_autoset",
    "_commit_hash",
    "_flash_attn_2_enabled",
    "_from_model_config",
    "_name_or_path",
    "_num_labels",
    "_output_attentions",
    "_remove_final_layer_norm",
    "_sliding_window_pattern",
    "__type",
}
# "owner/name" here is a kernel on the hub, which is code; the flash_attention names stand for
# such kernels too where their package is not installed.
IMPLEMENTATIONS = {"eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm", None}
REFUSED_KEYS = {
    "auto_map": "names Python code to import",
    "configuration_files": "names another configuration to read instead",
    "custom_generate": "names Python code to run",
    "custom_pipelines": "names Python code to import",
    "fast_tokenizer_files": "names other files to read instead",
    "quantization_config": "describes quantised weights, which cannot be trained",
    "transformers_weights": "names another weights file",
    "trust_remote_code": "asks to run code",
}
LAYERS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"}
MAX_COUNTS = {**dict.fromkeys(LAYERS, 2_000), "num_labels": 100_000, "_num_labels": 100_000}
TOKENIZER_CLASS = re.compile(r"\w+(Tokenizer|TokenizerFast|Backend)")


def check_model_directory(
    path: str | Path,
    *,
    root: str | Path | None = None,
    max_parameters: int = MAX_PARAMETERS,
    verify: bool = False,
) -> None:
    """Refuse what is no plain model directory: config.json, safetensors weights, no code.

    Args:
        root: the directory must lie in it, and links may point to anywhere in it; by default
            they must stay in the model directory. In the hub's cache, where a model is made of
            links, they may point to that model's own folder.
        max_parameters: the most that the safetensors headers may declare, over all shards.
        verify: where there is an export.json, compare every file with its SHA-256, which takes
            about a second a gigabyte.

    Raises:
        ValueError: one sentence that names the file and what to do.
    """
    with _readable(path):
        path = Path(path)
        names = _check_files(path, root)
        require("config.json" in names, f"{path} is no model directory: it has no config.json")
        require(
            "adapter_config.json" not in names,
            f"{path} holds an adapter, whose base would be loaded by name; merge it into its base "
            "(peft's merge_and_unload) and save that",
        )
        _check_settings_files(path, names)
        require(
            isinstance(
                read_json(path / "config.json", SIZES["config.json"]).get("model_type"), str
            ),
            f"{path / 'config.json'} has no model_type, so transformers would have to guess it",
        )
        found = parameter_count(path)
        require(
            found <= max_parameters,
            f"{path} declares {found:,} parameters, and {max_parameters:,} are the most allowed",
        )
        if verify and "export.json" in names:
            _verify(path, names)


def check_tokenizer_directory(path: str | Path) -> None:
    """The same for a directory of which the tokenizer alone is loaded: it may lack a model."""
    with _readable(path):
        path = Path(path)
        _check_settings_files(path, _check_files(path, None))


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _check_files(path: Path, root: str | Path | None) -> set[str]:
    """The names at the top; every file is a plain one, in its place, and none is code."""
    if root is None and path.absolute().parent.name == "snapshots":
        root = path.absolute().parent.parent  # the hub's cache: links into blobs/, beside it
    # realpath, because Path.resolve raises RuntimeError on a loop of links
    inside = Path(os.path.realpath(root if root is not None else path))
    require(
        Path(os.path.realpath(path)).is_relative_to(inside),
        f"{path} lies outside {root}; models are loaded from there alone",
    )
    require(path.is_dir(), f"model directory {path} does not exist")
    names = set()
    for count, entry in enumerate(_walk(path)):
        require(count < MAX_FILES, f"{path} holds more than {MAX_FILES:,} files; is it a model?")
        file = Path(entry.path)
        real = Path(os.path.realpath(file))
        require(
            real.is_relative_to(inside),
            f"{file} is a link that leaves {inside}; put the file itself there",
        )
        require(real.exists(), f"{file} is a link to nothing; put the file itself there")
        require(
            real.is_dir() or stat.S_ISREG(real.stat().st_mode),
            f"{file} is no plain file; delete it",
        )
        require(
            not file.name.lower().endswith((".py", ".pyc", ".so", ".pyd")),
            f"{file} is code, which a model must not bring; delete it if the model's architecture "
            "is one of transformers' own",
        )
        if file.parent == path:
            names.add(file.name)
    return names


def _check_settings_files(path: Path, names: set[str]) -> None:
    for name in sorted(names & TEXT_SIZES.keys()):
        _check_size(path / name, TEXT_SIZES[name])
    for template in path.glob("additional_chat_templates/*"):
        _check_size(template, TEXT_SIZES["chat_template.jinja"])
    for name in sorted(names & SIZES.keys() - {INDEX, "export.json"}):
        settings = read_json(path / name, SIZES[name])
        if name != "added_tokens.json":  # its keys are tokens
            check_settings(settings, str(path / name))
        if name == "tokenizer_config.json":
            _check_tokenizer_settings(settings, path / name)


def _walk(path: Path) -> Iterator[os.DirEntry[str]]:
    """All entries; links to directories are given and not entered."""
    waiting = [path]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))


def _check_size(path: Path, largest: int) -> None:
    size = path.stat().st_size
    require(size <= largest, f"{path} has {size:,} bytes, and {largest:,} are the most allowed")


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """A JSON object of at most `largest` bytes; ValueError for anything else."""
    _check_size(path, largest)
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not valid JSON; download or export it again") from None
    require(isinstance(value, dict), f"{path} must hold a JSON object; download it again")
    return value


def check_settings(
    settings: dict[str, Any], place: str, *, ignored: frozenset[str] = frozenset()
) -> None:
    """Refuse keys, at any depth, by which transformers would import or fetch something.

    `ignored` keys are let through, such as `auto_map` of a hub model, which stays without effect
    while `trust_remote_code` is off.
    """
    waiting: list[Any] = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        if not isinstance(value, dict):
            continue
        waiting += [v for k, v in value.items() if k != "label2id"]  # whose keys are labels
        for key, given in value.items():
            if key.endswith("_implementation"):
                choices = list(given.values()) if isinstance(given, dict) else [given]
                require(
                    all(not isinstance(c, dict | list) and c in IMPLEMENTATIONS for c in choices),
                    f"{place} asks for {key} {_short(given)}, which may be code from the hub; "
                    "take that line out",
                )
            elif key in REFUSED_KEYS and key not in ignored and given not in (None, [], {}, False):
                raise ValueError(
                    f"{place} has {key}, which {REFUSED_KEYS[key]}; take it out if the model is "
                    "one of transformers' own, or choose another model"
                )
            elif key.startswith("_") and key not in HARMLESS_KEYS:
                raise ValueError(f"{place} sets the private key {_short(key)}; take that line out")
            if key in MAX_COUNTS:
                require(
                    given is None or (type(given) is int and 0 <= given <= MAX_COUNTS[key]),
                    f"{place} has {key} {_short(given)}, and it must be 0 to {MAX_COUNTS[key]:,}",
                )


def _check_tokenizer_settings(settings: dict[str, Any], path: Path) -> None:
    kind = settings.get("tokenizer_class")
    require(
        kind is None or (isinstance(kind, str) and bool(TOKENIZER_CLASS.fullmatch(kind))),
        f"{path} names the class {_short(kind)}, which is no tokenizer",
    )
    require(
        not settings.get("init_inputs"),
        f"{path} has init_inputs, which may name files elsewhere; take that line out",
    )
    templates = settings.get("chat_template") or ""
    require(
        len(json.dumps(templates)) <= TEXT_SIZES["chat_template.jinja"],
        f"{path} has a chat template of more than {TEXT_SIZES['chat_template.jinja']:,} characters",
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Weights -----------------------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers would load, in order of their names."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        pickles = sorted(f.name for f in path.iterdir() if f.name.lower().endswith(PICKLES))
        raise ValueError(
            f"{path} has pickled weights alone ({pickles[0]}), and pickled weights are refused: "
            "loading them can run code; convert them where you trust them: load the model with "
            "transformers' from_pretrained and save it with save_pretrained"
            if pickles
            else f"{path} has no {WEIGHTS} and no {INDEX}; download it again"
        )
    shards = read_json(path / INDEX, SIZES[INDEX]).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{path / INDEX} has no weight_map; download it again")
    for name in shards.values():
        require(
            isinstance(name, str)
            and name.endswith(".safetensors")
            and not set(name) & set("/\\\0:"),
            f"{path / INDEX} names the shard {_short(name)}; a shard is a *.safetensors file "
            "in the same directory",
        )
        require(
            (path / name).is_file(),
            f"{path / INDEX} names the shard {_short(name)}, which is missing; download it again",
        )
    files = [path / name for name in sorted(set(shards.values()))]
    for file in files:
        there = _header(file)
        lacking = [k for k, v in shards.items() if v == file.name and k not in there]
        require(
            not lacking,
            f"{file} lacks {len(lacking)} tensors that {INDEX} says it has; download it again",
        )
    return files


def parameter_count(path: str | Path) -> int:
    """How many numbers the weights of a model directory hold, by the headers of their files."""
    return sum(
        math.prod(tensor["shape"])
        for file in weight_files(Path(path))
        for tensor in _header(file).values()
    )


def _header(path: Path) -> dict[str, Any]:
    """Tensor -> dtype, shape and place of a safetensors file, once they fit its size."""
    broken = f"{path} is broken or cut short; download or export it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        require(length <= size - 8, broken)
        require(length <= HEADER_SIZE, f"{path} has a header of {length:,} bytes, which is absurd")
        try:
            header = json.loads(file.read(length).decode("utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(broken) from None
    require(isinstance(header, dict), broken)
    header.pop("__metadata__", None)
    for tensor in header.values():
        fields = tensor if isinstance(tensor, dict) else {}
        shape, place = fields.get("shape"), fields.get("data_offsets", [])
        require(_are_sizes(shape, 0, 8) and _are_sizes(place, 2, 2), broken)
        require(place[0] <= place[1] <= size - 8 - length, broken)
    return header


def _are_sizes(value: Any, fewest: int, most: int) -> bool:
    """Whether it is a list of so many sizes; a product of more and larger ones takes hours."""
    return (
        isinstance(value, list)
        and fewest <= len(value) <= most
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
    )


def _verify(path: Path, names: set[str]) -> None:
    """Compare an export with the SHA-256 of each file in its export.json."""
    digests = read_json(path / "export.json", SIZES["export.json"]).get("sha256")
    if not isinstance(digests, dict):
        raise ValueError(f"{path / 'export.json'} has no sha256 of the files; export it again")
    inner = path / "adapter"
    held = names | {f"adapter/{file.name}" for file in (inner.iterdir() if inner.is_dir() else ())}
    for name, digest in digests.items():
        require(name in held, f"{path}: {_short(name)} is missing; export it again")
        require(
            sha256(path / name) == digest,
            f"{path}: {name} was changed after it was exported; export it again",
        )
    for name in sorted(names & (SIZES.keys() | TEXT_SIZES.keys() | {WEIGHTS}) - {"export.json"}):
        require(
            name in digests,
            f"{path}: {name} was added after the export; delete it, or export again",
        )
