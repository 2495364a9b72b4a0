"""Model directories made by somebody else: what is refused, by which sentence, and what passes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.checkpoint import export
from rlhf_kit.models import TOY_WORLD, load_causal_lm, load_scorer, resolve_model
from rlhf_kit.tokenization import load_tokenizer
from rlhf_kit.trust import check_model_directory, parameter_count

ModelDir = Callable[..., str]


@pytest.fixture
def model(tmp_path: Path, model_dir: ModelDir) -> Path:
    """A good model directory, to be spoiled."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


def refused(path: Path, words: str, **keywords: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        check_model_directory(path, **keywords)
    assert "\n" not in str(caught.value)


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(directory: Path) -> None:
    """Cut the weights in two, as large models have them."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_header(path: Path, header: Any, *, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text)


# What passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_directories_that_transformers_wrote_pass(kind: str, model_dir: ModelDir):
    check_model_directory(model_dir(kind))


def test_the_shipped_base_model_and_exports_pass(reward_dir: str):
    check_model_directory(resolve_model(TOY_WORLD), verify=True)
    check_model_directory(reward_dir, verify=True)


def test_parameters_are_counted_from_the_headers(model: Path, tokenizer: Any):
    names = dict(load_causal_lm(str(model), tokenizer).named_parameters())
    assert parameter_count(model) == sum(tensor.numel() for tensor in names.values())
    before = parameter_count(model)
    shard(model)
    assert parameter_count(model) == before
    check_model_directory(model, max_parameters=before)
    refused(model, f"declares {before:,} parameters", max_parameters=before - 1)


def test_pickles_beside_safetensors_are_never_read_and_so_may_stay(model: Path, tokenizer: Any):
    for name in ("pytorch_model.bin", "training_args.bin", "model.pkl"):
        (model / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    check_model_directory(model)
    load_causal_lm(str(model), tokenizer)


def test_the_keys_that_older_transformers_wrote_pass(model: Path):
    change(
        model / "config.json",
        _name_or_path="owner/name",
        _commit_hash=None,
        _attn_implementation_autoset=True,
        attn_implementation="sdpa",
        auto_map={},
        label2id={"_private": 0},
    )
    check_model_directory(model)


def test_links_in_the_hubs_cache_pass(tmp_path: Path, model: Path):
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    check_model_directory(snapshot)
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "elsewhere.json")
    (tmp_path / "elsewhere.json").write_text("{}")
    refused(snapshot, "is a link that leaves")


# Code --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PKL", "epoch=1.ckpt"])
def test_pickled_weights_alone_are_refused_with_the_way_to_convert_them(model: Path, name: str):
    (model / "model.safetensors").rename(model / name)
    refused(model, f"pickled weights alone ({name})")
    refused(model, "save it with save_pretrained")


@pytest.mark.parametrize("name", ["modeling_x.py", "custom_generate/generate.PY", "a/b/c.so"])
def test_code_is_refused_wherever_it_lies(model: Path, name: str):
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).write_text("")
    refused(model, f"{name} is code")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": {"AutoModel": "owner/name--x.Y"}}, "auto_map, which names Python code"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, "auto_map, which names Python code"),
        ({"trust_remote_code": True}, "trust_remote_code, which asks to run code"),
        ({"_attn_implementation": "owner/kernel"}, "_attn_implementation 'owner/kernel'"),
        ({"_attn_implementation_internal": "owner/kernel"}, "private key"),
        ({"attn_implementation": "owner/kernel"}, "may be code from the hub"),
        ({"attn_implementation": "flash_attention_2"}, "may be code from the hub"),
        ({"attn_implementation": {"": "eager", "x": "a/b"}}, "may be code from the hub"),
        ({"attn_implementation": [["eager"]]}, "may be code from the hub"),
        ({"sub": [{"experts_implementation": "owner/kernel"}]}, "may be code from the hub"),
        ({"_auto_class": "AutoModel"}, "sets the private key '_auto_class'"),
        ({"__class__": "x"}, "sets the private key '__class__'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised weights"),
        ({"transformers_weights": "x.bin"}, "names another weights file"),
        ({"configuration_files": ["config.4.0.0.json"]}, "names another configuration"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, and it must be"),
        ({"num_labels": 10**9}, "num_labels 1000000000, and it must be"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers '4', and it must be"),
        ({"model_type": None}, "has no model_type"),
    ],
)
def test_a_configuration_that_asks_for_more_than_numbers_is_refused(
    model: Path, changes: dict[str, Any], words: str
):
    change(model / "config.json", **changes)
    refused(model, words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auto_map": ["x.Y", None]}, "auto_map, which names Python code"),
        ({"tokenizer_class": "AutoModelForCausalLM"}, "which is no tokenizer"),
        ({"tokenizer_class": ["x"]}, "which is no tokenizer"),
        ({"init_inputs": ["/etc/passwd"]}, "init_inputs"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "names other files"),
        ({"chat_template": "x" * 300_000}, "has a chat template of more than"),
    ],
)
def test_a_tokenizer_configuration_that_names_code_or_files_is_refused(
    model: Path, changes: dict[str, Any], words: str
):
    change(model / "tokenizer_config.json", **changes)
    refused(model, words)


def test_an_adapter_is_refused_because_its_base_would_be_fetched_by_name(model: Path):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    refused(model, "merge it into its base")


# Places ------------------------------------------------------------------------------------


def test_links_may_stay_inside_and_may_not_leave(model: Path, tmp_path: Path):
    (model / "again.json").symlink_to("config.json")
    check_model_directory(model)
    other = tmp_path / "other.safetensors"
    (model / "model.safetensors").rename(other)
    (model / "model.safetensors").symlink_to(other)
    refused(model, "is a link that leaves")
    check_model_directory(model, root=tmp_path)
    other.unlink()
    refused(model, "is a link to nothing", root=tmp_path)
    os.symlink("loop", model / "loop")
    (model / "model.safetensors").unlink()
    refused(model, "loop is a link to nothing")


@pytest.mark.parametrize("way", ["..", "link", "absolute", "root/../other", "prefix"])
def test_a_directory_outside_the_root_is_refused(tmp_path: Path, model_dir: ModelDir, way: str):
    (tmp_path / "root").mkdir()
    for name in ("other", "root-2"):
        shutil.copytree(model_dir(), tmp_path / name)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "other")
    path = {
        "..": tmp_path / "root" / ".." / "other",
        "link": tmp_path / "root" / "link",
        "absolute": tmp_path / "other",
        "root/../other": tmp_path / "root" / "link" / ".." / "other",
        "prefix": tmp_path / "root-2",
    }[way]
    refused(path, "lies outside", root=tmp_path / "root")


def test_what_is_no_plain_file_is_refused_without_being_opened(model: Path):
    os.mkfifo(model / "chat_template.jinja.pipe")
    refused(model, "is no plain file")


def test_a_path_that_is_no_directory_or_no_path_is_one_sentence(tmp_path: Path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(tmp_path, "has no config.json")
    refused(Path("a\0b"), "null")


# Sizes and broken files --------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": NaN', "\ufeff{}", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_broken_json_file_is_named(model: Path, name: str, text: str):
    (model / name).write_text(text, encoding="utf-8")
    refused(model, name)


def test_files_larger_than_any_model_needs_are_refused_unread(model: Path):
    for name in ("config.json", "chat_template.jinja", "tokenizer.json"):
        size = (model / name).stat().st_size
        os.truncate(model / name, 1 << 33)  # a hole: it takes no room on the disk
        refused(model, f"{name} has 8,589,934,592 bytes")
        os.truncate(model / name, size)
    check_model_directory(model)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], **changes}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"x": []},
        {"x": {}},
        tensor(shape=["a"]),
        tensor(shape=[-1]),
        tensor(shape=[True]),
        tensor(shape=[1] * 9),
        tensor(shape=[1 << 60]),
        tensor(data_offsets=[0]),
        tensor(data_offsets=[4, 0]),
        tensor(data_offsets=[0, 1]),
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(model: Path, header: Any):
    write_header(model / "model.safetensors", tensor())
    check_model_directory(model)
    write_header(model / "model.safetensors", header)
    refused(model, "broken or cut short")


def test_a_header_that_claims_an_absurd_length_is_refused_unread(model: Path):
    write_header(model / "model.safetensors", {}, length=1 << 40)
    refused(model, "broken or cut short")
    write_header(model / "model.safetensors", {}, length=1 << 30)
    os.truncate(model / "model.safetensors", 1 << 31)
    refused(model, "a header of 1,073,741,824 bytes")


def test_weights_cut_short_are_refused(model: Path):
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)
    refused(model, "model.safetensors is broken or cut short")
    os.truncate(model / "model.safetensors", 3)
    refused(model, "model.safetensors is broken or cut short")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../model/config.json", "a shard is a *.safetensors file"),
        ("/etc/x.safetensors", "a shard is a *.safetensors file"),
        ("x\\y.safetensors", "a shard is a *.safetensors file"),
        ("pytorch_model.bin", "a shard is a *.safetensors file"),
        (3, "a shard is a *.safetensors file"),
        ("missing.safetensors", "which is missing"),
        ("model-00002-of-00002.safetensors", "lacks 1 tensors"),
    ],
)
def test_an_index_names_shards_that_are_there(model: Path, name: Any, words: str):
    shard(model)
    check_model_directory(model)
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first = next(key for key, place in places.items() if place.startswith("model-00001"))
    change(index, weight_map={**places, first: name})
    refused(model, words)


def test_an_index_without_its_map_is_refused(model: Path):
    shard(model)
    change(model / "model.safetensors.index.json", weight_map=[])
    refused(model, "has no weight_map")


# Exports -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_an_export_is_found_when_it_is_verified(
    tmp_path: Path, model: Path, tokenizer: Any
):
    exported = export(load_causal_lm(str(model), tokenizer), tokenizer, tmp_path / "sft")
    weights = exported / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    check_model_directory(exported)
    refused(exported, "model.safetensors was changed after it was exported", verify=True)
    with pytest.raises(ValueError, match="was changed after it was exported"):
        load_causal_lm(str(exported), tokenizer)


def test_a_file_that_joined_an_export_later_is_found(reward_dir: str, tmp_path: Path):
    exported = Path(shutil.copytree(reward_dir, tmp_path / "reward"))
    (exported / "notes.txt").write_text("mine")
    check_model_directory(exported, verify=True)
    (exported / "added_tokens.json").write_text("{}")
    refused(exported, "added_tokens.json was added after the export", verify=True)
    (exported / "added_tokens.json").unlink()
    (exported / "tokenizer.json").unlink()
    refused(exported, "is missing", verify=True)
    (exported / "export.json").write_text("{}")
    refused(exported, "has no sha256", verify=True)


# Loading -----------------------------------------------------------------------------------

OFFLINE = """
import socket, sys

asked = []

def blocked(*where, **_):
    asked.append(where)
    raise OSError("no network")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = blocked
from rlhf_kit.models import load_causal_lm, load_scorer
from rlhf_kit.tokenization import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
load_causal_lm(sys.argv[1], tokenizer)
load_scorer(sys.argv[2], tokenizer)
assert not asked, asked
import huggingface_hub.constants
huggingface_hub.constants.HF_HUB_OFFLINE = True  # as the variable sets it
try:
    load_causal_lm("owner/name", tokenizer)
except ValueError as error:
    print(error)
assert not asked, asked
"""


def test_local_directories_load_without_a_network_and_hub_names_say_so(
    model_dir: ModelDir, reward_dir: str, tmp_path: Path
):
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, model_dir(), reward_dir],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("owner/name is no local directory")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("load", [load_causal_lm, load_scorer])
def test_loading_refuses_a_directory_that_names_code(model: Path, tokenizer: Any, load: Any):
    change(model / "config.json", attn_implementation="owner/kernel")
    with pytest.raises(ValueError, match="may be code from the hub"):
        load(str(model), tokenizer)


def test_a_tokenizer_that_names_code_is_refused(model: Path):
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    with pytest.raises(ValueError, match="auto_map, which names Python code"):
        load_tokenizer(model)


def test_weights_that_are_missing_are_never_drawn_at_random(model: Path, tokenizer: Any):
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    assert lost.numel()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(str(model), tokenizer)


def test_a_configuration_larger_than_its_weights_is_refused_before_memory_is_taken(
    model: Path, tokenizer: Any
):
    change(model / "config.json", num_hidden_layers=20, hidden_size=256)
    with pytest.raises(ValueError, match="and its weights hold"):
        load_causal_lm(str(model), tokenizer)


def test_a_configuration_that_does_not_fit_its_weights_is_one_sentence(model: Path, tokenizer: Any):
    for changes in ({"intermediate_size": 47}, {"num_attention_heads": 0}, {"rope_parameters": 3}):
        shutil.copy(model / "config.json", model / "kept")
        change(model / "config.json", **changes)
        with pytest.raises(ValueError) as caught:
            load_causal_lm(str(model), tokenizer)
        assert "\n" not in str(caught.value)
        shutil.copy(model / "kept", model / "config.json")
