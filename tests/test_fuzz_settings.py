"""Random settings, flags, recipes and command lines: right, or one sentence, and never a traceback.

HYPOTHESIS_PROFILE=nightly tries 5,000 examples of each instead of 100.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit import chat, cli, launch, pipeline
from rlhf_kit.config import PRESETS, RunConfig, from_dict, override, preset
from rlhf_kit.parameters import check_values, parameters_of, parse_flags, read_recipe

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "04_ppo.py"
PARAMETERS = parameters_of(NOTEBOOK)

text = st.text(max_size=20)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 5),
    st.sampled_from([10**30, -(10**400), 2**31, 0.5, 1e-5]),
    st.floats(),
    text,
    st.sampled_from(["toy", "bf16", "1e-5", "toy_world", "null", "\0", "\udcff", "x" * 5000]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every setting and of every group of settings."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += leaves(value, (*path, key))
    return found


DEFAULT = json.loads(json.dumps(preset("toy").to_dict()))
PATHS = leaves(DEFAULT)
NAMES = ["__".join(path) for path in PATHS if all(isinstance(key, str) for key in path)]


def one_sentence(error: BaseException) -> None:
    assert isinstance(error, ValueError), repr(error)
    assert str(error).strip() and "\n" not in str(error), repr(str(error))


def survives_a_round_trip(config: RunConfig) -> None:
    assert from_dict(config.to_dict()) == config
    assert from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    dumped = yaml.safe_dump(json.loads(json.dumps(config.to_dict())), allow_unicode=True)
    assert from_dict(yaml.safe_load(dumped)) == config


# Configurations ----------------------------------------------------------------------------


def spoil(settings: Any, path: tuple[Any, ...], value: Any, how: str) -> None:
    """Set, remove or add something at `path`, where an earlier change has left it."""
    node = settings
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for key in path[:-1]:
            node = node[key]
        if how == "remove":
            del node[path[-1]]
        else:
            node[path[-1] if how == "set" else str(value)] = value


changes = st.tuples(
    st.sampled_from(PATHS), values, st.sampled_from(["set", "set", "remove", "add"])
)


@given(st.lists(changes, max_size=3))
def test_a_spoiled_configuration_is_refused_or_survives_json_and_yaml(changes: list[Any]):
    settings = copy.deepcopy(DEFAULT)
    for change in changes:
        spoil(settings, *change)
    try:
        config = from_dict(settings)
    except Exception as error:
        one_sentence(error)
    else:
        survives_a_round_trip(config)


@given(st.dictionaries(st.sampled_from(NAMES) | text, values, min_size=1, max_size=3))
def test_an_override_is_refused_or_changes_what_it_names(changes: dict[str, Any]):
    try:
        config = override(preset("toy"), **changes)
    except Exception as error:
        one_sentence(error)
    else:
        survives_a_round_trip(config)
        for name, value in changes.items():
            if value is None:
                continue  # as it is
            node: Any = config.to_dict()
            for key in name.split("__"):
                node = node[key]
            if not isinstance(value, dict | list):
                assert node == value


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json_and_yaml(name: str):
    survives_a_round_trip(preset(name))


@pytest.mark.parametrize(
    "changes",
    [
        {"ppo__kl__coef": float("nan")},
        {"generation__temperature": float("inf")},
        {"ppo__kl__coef": 10**400},
        {"seed": 10**5000},
        {"data__sources": [{}]},
        {"\n": 1},
        {"ppo__\n": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_long_search_once_found_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError) as caught:
        override(preset("toy"), **changes)
    one_sentence(caught.value)


# Flags and recipes -------------------------------------------------------------------------

flags = st.sampled_from([f"--{p.name}" for p in PARAMETERS] + ["--local_rank", "--no-resume"])
words = st.one_of(
    text,
    flags,
    st.tuples(flags, text | scalars.map(str)).map("=".join),
    st.sampled_from(["--", "-h", "--config", "--=", "--config=nowhere.yaml", "1", "0.5", "none"]),
)


@given(st.lists(words, max_size=6))
def test_flags_give_values_of_their_types_or_one_sentence(given_words: list[str]):
    try:
        found = parse_flags(PARAMETERS, given_words)
    except Exception as error:
        one_sentence(error)
    else:
        assert check_values(PARAMETERS, found) == found


recipes = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda t: t.encode("utf-8")),
    st.dictionaries(st.sampled_from([p.name for p in PARAMETERS]) | text, values, max_size=3).map(
        lambda recipe: yaml.safe_dump(recipe, allow_unicode=True).encode("utf-8", "replace")
    ),
    st.sampled_from(
        [
            b"!!python/object/apply:os.system ['exit 1']",
            b"a: &a [*a]",
            b"a: &a [1]\nb: [*a, *a]",
            b"? [1]\n: 2",
            b"{" * 300,
            b"iterations: 0o17\n",
            b"2001-01-01: 2001-01-01",
            b"iterations: .nan",
            "a: 1".encode("utf-16"),
        ]
    ),
)


@given(recipes)
def test_a_recipe_gives_values_of_their_types_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_bytes(content)
    try:
        found = read_recipe(PARAMETERS, path)
    except Exception as error:
        one_sentence(error)
    else:
        assert check_values(PARAMETERS, found) == found


cells = st.sampled_from(
    [
        "iterations: int = 60  # rounds",
        "x: float = 1e999  # too large",
        "x: int = 1 if True else 2  # no literal",
        "x: str = 'a'",
        "x = 1  # no type",
        "x: list[int] = []  # no kind",
        "x: int = (  # open",
        "x: bool | None = None  # optional",
        "import os  # code",
        "x: int = " + "9" * 5000 + "  # long",
        "x: int = " + "-" * 3000 + "1  # deep",
        "'''",
        "\tx: int = 1 # tab",
        "\\",
        "\0",
    ]
)


@given(st.lists(cells | text, max_size=4), st.sampled_from([".py", ".ipynb", ".txt"]), st.data())
def test_a_notebook_has_parameters_or_one_sentence_says_why_not(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], suffix: str, data: st.DataObject
):
    source = "\n".join(lines)
    if suffix == ".ipynb":
        cell = {"source": [source], "metadata": {"tags": ["parameters"]}, "cell_type": "code"}
        notebook: Any = {"cells": [cell], "metadata": {}, "nbformat": 4}
        target = data.draw(st.sampled_from(["source", "metadata", "cells", "nothing", "all"]))
        value = data.draw(values)
        if target == "all":
            notebook = value
        elif target == "cells":
            notebook["cells"] = value
        elif target != "nothing":
            cell[target] = value
        source = json.dumps(notebook)
    else:
        source = '# %% tags=["parameters"]\n' + source
    path = tmp_path_factory.getbasetemp() / f"notebook{suffix}"
    path.write_bytes(source.encode("utf-8", "surrogatepass"))
    try:
        found = parameters_of(path)
    except Exception as error:
        one_sentence(error)
    else:
        assert all(p.check(p.default) == p.default for p in found)


# Command lines -----------------------------------------------------------------------------

PLACES = ["", ".", "..", "nowhere", "a\0b", "x" * 300, "\udcff", "a/b/c", "file", "run", "broken"]
COMMANDS = ["train", "run", "report", "chat", "app", "data", "from-votes"]
OPTIONS = """
--preset --actor-model --reward-model --data --seed --set --output-dir --resume --checkpoint
--system --temperature --top-p --max-new-tokens --port --host --share --language --output --help
--version -h --
""".split()
WORDS = [
    "toy",
    "nan",
    "-1",
    "1e400",
    "final",
    "toy_world=1",
    "toy_world=-inf",
    "os:getcwd",
    "ppo.kl.coef=0.1",
    "ppo.kl.coef=x",
    "data.rows=[1, 2]",
    "data.sources=[{name: toy_world}]",
    "ppo=1",
    "=",
    "seed=!!python/name:os.system",
    str(NOTEBOOK),
    "--iterations=2",
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where random commands find a file, a run and a broken run."""
    path = tmp_path_factory.mktemp("commands")
    (path / "file").write_text("no directory")
    (path / "broken").mkdir()
    (path / "broken" / "run.json").write_text("[]")
    (path / "run").mkdir()
    record = {"config": preset("toy").to_dict(), "stages": {}, "finished": None, "seed": 1}
    (path / "run" / "run.json").write_text(json.dumps(record))
    return path


@pytest.fixture(scope="module", autouse=True)
def nothing_starts(workplace: Path) -> Iterator[None]:
    """Commands read and check what they are given, and stop where the work would begin."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_commands(monkeypatch)
        monkeypatch.chdir(workplace)
        yield


def stop_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    app: Any = types.ModuleType("apps.chat")
    app.main = lambda *_, **__: 0
    monkeypatch.setitem(sys.modules, "apps.chat", app)
    monkeypatch.setattr(pipeline, "train", lambda *_, **__: 1)
    monkeypatch.setattr(launch, "run_notebook", lambda *_, **__: 0)
    monkeypatch.setattr(chat, "load_session", lambda *_, **__: pytest.fail("a model was found"))


@given(
    st.sampled_from(COMMANDS),
    st.lists(st.sampled_from(OPTIONS + WORDS + PLACES) | text, max_size=7),
)
def test_a_command_line_ends_with_a_code_and_one_sentence(
    workplace: Path, command: str, rest: list[str]
):
    try:
        code = cli.main([command, *rest])
    except SystemExit as ending:
        code = ending.code
    assert code in (0, 1, 2)
    for name in os.listdir(workplace):  # runs that the command has begun
        if name not in ("file", "broken", "run"):
            shutil.rmtree(workplace / name, ignore_errors=True)


settings = st.tuples(st.sampled_from(NAMES), values.map(json.dumps) | text)


@given(st.lists(settings.map(lambda s: f"--set={s[0].replace('__', '.')}={s[1]}"), max_size=3))
def test_settings_on_the_command_line_are_taken_or_refused(workplace: Path, rest: list[str]):
    shutil.rmtree(workplace / "new", ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = cli.main(["train", "--preset", "toy", "--output-dir", "new", *rest])
    printed = stderr.getvalue()
    assert (code == 2) == printed.startswith("error: "), printed
    if code == 2:
        assert printed.count("\n") == 1
    else:
        from_dict(pipeline.read_record(workplace / "new")["config"])
