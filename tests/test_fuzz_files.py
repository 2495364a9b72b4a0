"""Random and spoiled files: read right, or refused in one sentence, and never another exception.

HYPOTHESIS_PROFILE=nightly tries 5,000 examples of each.
"""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_fuzz_settings import one_sentence, values

from rlhf_kit import data_files, integrity, pipeline
from rlhf_kit.chat_template import encode_prompt, encode_response
from rlhf_kit.checkpoint import export
from rlhf_kit.config import SourceConfig, preset
from rlhf_kit.datasets import load_source
from rlhf_kit.models import load_causal_lm
from rlhf_kit.tokenization import load_tokenizer
from rlhf_kit.trust import check_model_directory
from rlhf_kit.types import Message, PreferencePair

FEWER = settings(max_examples=max(1, settings().max_examples // 2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


# Datasets ----------------------------------------------------------------------------------

GOOD = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
COLUMNS = "prompt chosen rejected messages instruction output conversations kind role".split()
rows = st.one_of(
    st.just(GOOD),
    st.dictionaries(st.sampled_from(COLUMNS), values, max_size=4),
    st.dictionaries(
        st.sampled_from(["prompt", "messages", "conversations", "chosen"]),
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "role": st.sampled_from(["user", "assistant", "system", "x", None]),
                    "content": values,
                    "from": st.sampled_from(["human", "gpt", 3, None]),
                    "value": values,
                },
            ),
            max_size=3,
        ),
        max_size=3,
    ),
    values,
)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"[" * 2000,
            b'{"prompt": "a\\u0000b", "chosen": "\\ud800", "rejected": "x"}',
            json.dumps(GOOD).encode("utf-16"),
            b"\xef\xbb\xbf" + json.dumps(GOOD).encode(),
            b'{"prompt": 1' + b"0" * 5000 + b"}",
            b"prompt,chosen,rejected",
            b'a,"b,c',
            b"NaN",
        ]
    ),
)
files = st.one_of(
    st.lists(lines, max_size=5).map(b"\n".join),
    st.lists(rows, max_size=4).map(lambda rows: json.dumps(rows).encode()),
    st.binary(max_size=200),
)


@given(files, st.sampled_from(data_files.SUFFIXES), st.sampled_from(["sft", "reward", "ppo"]))
def test_a_data_file_gives_good_rows_or_one_sentence(
    place: Path, content: bytes, suffix: str, stage: Any
):
    path = place / f"rows{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    try:
        found = load_source(SourceConfig(str(path)), stage)
    except Exception as error:
        one_sentence(error)
    else:
        assert found.pairs and found.report.read >= len(found.pairs)
        for pair in found.pairs:
            assert isinstance(pair, PreferencePair) and pair.prompt[-1]["role"] == "user"
            assert all(message["content"] for message in pair.prompt)
            text = "".join(m["content"] for m in pair.prompt) + (pair.chosen or "")
            text.encode("utf-8")  # no lone surrogates


@given(st.binary(max_size=30), st.integers(0, 200), st.sampled_from([".jsonl.gz", ".parquet"]))
def test_a_broken_archive_is_one_sentence(place: Path, noise: bytes, where: int, suffix: str):
    path = place / f"broken{suffix}"
    packed = gzip.compress(b"\n".join([json.dumps(GOOD).encode()] * 3), mtime=0)
    path.write_bytes(packed[:where] + noise + packed[where + len(noise) :])
    try:
        found = load_source(SourceConfig(str(path)), "reward")
    except Exception as error:
        one_sentence(error)
    else:
        assert all(pair.chosen == GOOD["chosen"] for pair in found.pairs)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.jsonl"])
def test_a_small_archive_cannot_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(data_files, "LARGEST_LINE", 10_000)
    monkeypatch.setattr(data_files, "LARGEST_LIST", 10_000)
    content = b"[" * (".json." in name) + b"a" * 20_000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(ValueError, match="of more than"):
        load_source(SourceConfig(str(tmp_path / name)), "sft")


@pytest.mark.parametrize("name", ["rows.pkl", "rows.py", "rows.pt", "rows.arrow", "rows.npy", "x"])
def test_a_data_file_of_another_kind_is_never_opened(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="is none of"):
        load_source(SourceConfig(str(tmp_path / name)), "sft")


def test_a_dataset_with_a_script_has_its_json_read_and_its_script_left(tmp_path: Path):
    (tmp_path / "script.py").write_text("raise SystemExit('the script ran')")
    (tmp_path / "train.jsonl").write_text(json.dumps(GOOD))
    assert len(load_source(SourceConfig(str(tmp_path)), "reward").pairs) == 1


# run.json ----------------------------------------------------------------------------------

records = st.one_of(
    values.map(json.dumps),
    st.binary(max_size=40),
    st.dictionaries(
        st.sampled_from(["config", "stages", "finished", "seed"]), values, max_size=4
    ).map(json.dumps),
    st.tuples(st.sampled_from(["config", "stages", "finished"]), values).map(
        lambda change: json.dumps(
            {"config": preset("toy").to_dict(), "stages": {}, "finished": None}
            | {change[0]: change[1]}
        )
    ),
    st.sampled_from(["[" * 100_000, "{}", '{"config": 1e999}']),
)


@given(records)
def test_a_broken_record_of_a_run_is_one_sentence(place: Path, content: str | bytes):
    directory = place / "run"
    directory.mkdir(exist_ok=True)
    content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    (directory / "run.json").write_bytes(content)
    try:
        record = pipeline.open_run(
            directory, preset_name="toy", changes={}, resume=True, command="test"
        )
        pipeline.duration(pipeline.seconds_of(record))
    except Exception as error:
        one_sentence(error)
    else:
        assert isinstance(record["config"], dict)


# Model directories -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(model_dir: Callable[..., str]) -> Path:
    return Path(model_dir())


@pytest.fixture(scope="module")
def exported(good: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load_causal_lm(str(good), tokenizer)
    return export(model, tokenizer, tmp_path_factory.mktemp("export") / "final")


def spoiled(good: Path, copy: Path, data: st.DataObject) -> tuple[Path, bool]:
    """A copy with something wrong in one file, and whether its bytes are others now."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(good, copy)
    names = sorted(p.name for p in good.iterdir())
    path = copy / data.draw(st.sampled_from(names))
    before = path.read_bytes()
    how = data.draw(st.sampled_from(["bytes", "cut", "longer", "empty", "gone", "swap", "json"]))
    if how == "bytes":
        where = data.draw(st.integers(0, len(before) - 1) | st.integers(0, min(200, len(before))))
        noise = data.draw(st.binary(min_size=1, max_size=8))
        path.write_bytes(before[:where] + noise + before[where + len(noise) :])
    elif how == "cut":
        path.write_bytes(before[: data.draw(st.integers(0, len(before)))])
    elif how == "longer":
        path.write_bytes(before + data.draw(st.binary(min_size=1, max_size=20)))
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "gone":
        path.unlink()
    elif how == "swap":
        path.write_bytes((copy / data.draw(st.sampled_from(names))).read_bytes())
    elif path.suffix == ".json":
        content = json.loads(before)
        key = data.draw(st.sampled_from(sorted(content)) | st.text(max_size=10))
        content[key] = data.draw(values)
        path.write_text(json.dumps(content))
    return copy, not path.is_file() or path.read_bytes() != before


@FEWER
@given(st.data())
def test_a_spoiled_model_directory_is_refused_or_loaded_as_its_files_say(
    place: Path, good: Path, data: st.DataObject
):
    directory, _ = spoiled(good, place / "model", data)
    try:
        tokenizer = load_tokenizer(directory)
        model = load_causal_lm(str(directory), tokenizer)
    except Exception as error:
        one_sentence(error)
    else:
        saved = load_file(directory / "model.safetensors")
        state = model.state_dict()
        for name, tensor in saved.items():
            if state[name].shape == tensor.shape:  # the embeddings may have grown
                assert torch.allclose(state[name], tensor.float(), 0, 0, equal_nan=True)


@given(st.data())
def test_any_change_to_an_export_is_noticed(place: Path, exported: Path, data: st.DataObject):
    directory, changed = spoiled(exported, place / "export", data)
    try:
        check_model_directory(directory, verify=True)
    except Exception as error:
        one_sentence(error)
        assert changed
    else:
        harmless = not (directory / "export.json").is_file()
        same = all(
            (directory / file.name).read_bytes() == file.read_bytes()
            for file in exported.iterdir()
            if file.name != "export.json"
        )
        assert harmless or same


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a resume checkpoint looks like from outside."""
    target = tmp_path_factory.mktemp("sealed") / "step-00000020"
    with integrity.writing(target, {"step": 20}) as temporary:
        (temporary / "state.json").write_text(json.dumps({"step": 20, "seed": 1}))
        (temporary / "rank-0.safetensors").write_bytes(bytes(range(256)) * 4)
    return target


@given(st.data())
def test_any_change_to_a_sealed_directory_is_noticed(
    place: Path, sealed: Path, data: st.DataObject
):
    directory, changed = spoiled(sealed, place / "sealed", data)
    try:
        manifest = integrity.verify(directory)
    except Exception as error:
        one_sentence(error)
        assert changed
    else:
        assert manifest["step"] == 20
        for name in ("state.json", "rank-0.safetensors"):
            assert (directory / name).read_bytes() == (sealed / name).read_bytes()


# Chat templates ----------------------------------------------------------------------------

DIALOGUE = [Message(role="user", content="Why <|x|>?")]
pieces = st.sampled_from(
    [
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ m['content'] }}",
        "{{ m.role }}",
        "{{ messages[9].content }}",
        "{{ messages['x'] }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ raise_exception('no') }}",
        "{{ range(10 ** 9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% if add_generation_prompt %}A:{% endif %}",
        "{{ eos_token }}",
        "{{ none.x.y }}",
        "{{ strftime_now('%') }}",
        "{{ '%d' % 'x' }}",
        "{{ '\ud800' }}",
        "{{ messages | tojson }}",
        "{{ undefined_thing() }}",
        "{% set x = messages %}",
        "{{",
        "{% generation %}",
    ]
)


@given(st.lists(pieces | st.text(max_size=8), max_size=6).map("".join))
def test_a_chat_template_writes_a_dialogue_or_one_sentence_says_why_not(
    tokenizer: Any, template: str
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    for call in (
        lambda: encode_prompt(tokenizer, DIALOGUE),
        lambda: encode_response(tokenizer, DIALOGUE, "So."),
    ):
        try:
            ids = call()
        except Exception as error:
            one_sentence(error)
        else:
            assert all(0 <= i < len(tokenizer) for i in ids)
