"""The parameters cell of a notebook: its form, its flags and its recipe are one.

The cell tagged `parameters` holds typed, commented assignments of literals and nothing else:

    iterations: int = 60  # rollout and update rounds

Each name is a papermill parameter, a `--flag` of the file run as a script and a key of a YAML
recipe. Nothing here runs the notebook: the cell is read with `ast`.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import re
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_kit.config import printable, require

Value = bool | int | float | str | None
KINDS: dict[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
RESERVED = ("help", "config", "local_rank")
CELL = re.compile(r"^# %%")
TAGS = re.compile(r"tags=(\[[^\]]*\])")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


@dataclass(frozen=True)
class Parameter:
    """One assignment of the parameters cell."""

    name: str
    kind: type
    """bool, int, float or str."""
    optional: bool
    """Whether None is a value."""
    default: Value
    help: str
    """The comment above and beside the assignment."""
    line: int
    """Where it stands in the file; in an .ipynb, in the cell."""

    @property
    def annotation(self) -> str:
        return self.kind.__name__ + (" | None" if self.optional else "")

    def check(self, value: Any) -> Value:
        """`value` as this parameter's type; an int becomes a float, nothing else is guessed."""
        if self.kind is float and type(value) is int:
            return float(value)
        fits = type(value) is self.kind or (value is None and self.optional)
        require(fits, f"{self.name} must be of type {self.annotation}, not {value!r}")
        return value

    def parse(self, text: str) -> Value:
        """The value that `text`, a word of a command line, stands for."""
        if self.optional and text.lower() in ("none", "null"):
            return None
        if self.kind is str:
            return text
        choices = {"true": True, "false": False}
        try:
            return choices[text.lower()] if self.kind is bool else self.kind(text)
        except (KeyError, ValueError):
            message = f"--{self.name} must be of type {self.annotation}, not {text!r}"
            raise ValueError(message) from None


def _number(value: Any) -> Any:
    """1e-5 as the number it looks like: YAML 1.1 wants 1.0e-5 and else reads a string."""
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def yaml_value(text: str) -> Any:
    """`text` read as YAML, with 1e-5 as a number."""
    import yaml

    try:
        return _number(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"cannot read the value {text!r}: it is not valid YAML") from None


def parameters_of(path: str | Path) -> tuple[Parameter, ...]:
    """The parameters of a notebook, read without running it.

    `path` is a py:percent file or an .ipynb. ValueError names the file and the line where the
    parameters cell holds anything but `name: type = literal  # comment`, with a type of bool,
    int, float, str or one of these `| None`.
    """
    path = Path(path)
    offset, source = _parameters_cell(path)
    try:
        statements = ast.parse(source).body
        comments = _comments(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError, tokenize.TokenError) as error:
        line = offset + (getattr(error, "lineno", None) or 0)
        raise ValueError(f"{path}, line {line}: the parameters cell is not Python") from None
    parameters: dict[str, Parameter] = {}
    for node in statements:
        try:
            parameter = _parameter(node, comments, offset)
            require(parameter.name not in parameters, f"{parameter.name} is assigned twice")
        except ValueError as error:
            raise ValueError(f"{path}, line {offset + node.lineno}: {error}") from None
        parameters[parameter.name] = parameter
    return tuple(parameters.values())


def _parameters_cell(path: Path) -> tuple[int, str]:
    """How many lines stand before the cell tagged `parameters`, and its source."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise ValueError(f"there is no notebook {str(path)!r}, or it is not UTF-8") from None
    if path.suffix == ".ipynb":
        try:
            cells = [
                (0, "".join(cell["source"]))
                for cell in json.loads(text)["cells"]
                if "parameters" in cell["metadata"].get("tags", ())
            ]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is not a notebook: its JSON is broken") from None
    else:
        lines = text.splitlines()
        starts = [i for i, line in enumerate(lines) if CELL.match(line)]
        cells = []
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            tags = TAGS.search(lines[start])
            if tags and "parameters" in json.loads(tags[1]):
                cells.append((start + 1, "\n".join(lines[start + 1 : end])))
    require(
        len(cells) == 1, f"{path} has {len(cells)} cells tagged parameters; it needs exactly one"
    )
    return cells[0]


def _comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (comment, whether it stands alone on its line)."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            found[token.start[0]] = (token.string.lstrip("# "), alone)
    return found


def _parameter(node: ast.stmt, comments: Mapping[int, tuple[str, bool]], offset: int) -> Parameter:
    if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
        raise ValueError("a parameters cell holds lines like 'name: int = 1  # comment' only")
    name = node.target.id
    require(name not in RESERVED and not name.startswith("no_"), f"{name} is a reserved name")
    kind, _, rest = ast.unparse(node.annotation).partition(" | ")
    require(
        kind in KINDS and rest in ("", "None"),
        f"the type of {name} must be bool, int, float or str, or one of these '| None'",
    )
    try:
        default = ast.literal_eval(node.value)
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"the default of {name} must be a literal") from None
    words, line = [], node.lineno - 1
    while line in comments and comments[line][1]:
        words.insert(0, comments[line][0])
        line -= 1
    words += [comments[n][0] for n in comments if n == node.end_lineno]
    require(bool(words), f"{name} needs a comment that says what it is")
    parameter = Parameter(
        name, KINDS[kind], rest == "None", None, " ".join(words), offset + node.lineno
    )
    return replace(parameter, default=parameter.check(default))


def _named(parameters: Sequence[Parameter], name: str) -> Parameter:
    for parameter in parameters:
        if parameter.name == name:
            return parameter
    near = difflib.get_close_matches(name, [p.name for p in parameters], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists those there are"
    raise ValueError(f"unknown parameter {printable(name)}{hint}")


def parse_flags(parameters: Sequence[Parameter], words: Iterable[str]) -> dict[str, Value]:
    """The values that the words of a command line give; a flag wins over the recipe.

    `--name value`, `--name=value`, for booleans `--name` and `--no-name`, and `--config
    recipe.yaml`. The `--local_rank` of launchers is passed over.
    """
    flags: dict[str, Value] = {}
    recipe: dict[str, Value] = {}
    switches = {p.name for p in parameters if p.kind is bool}
    rest = iter(words)
    for word in rest:
        require(word.startswith("--"), f"cannot place {word!r}: write --name value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and name.removeprefix("no_") in switches:
            flags[name.removeprefix("no_")] = not name.startswith("no_")
            continue
        parameter = None if name in RESERVED else _named(parameters, name)
        if not equals:
            text = next(rest, "--")
            require(not text.startswith("--"), f"--{name} needs a value")
        if name == "config":
            recipe |= read_recipe(parameters, text)
        elif parameter is not None:
            flags[name] = parameter.parse(text)
    return recipe | flags


def read_recipe(parameters: Sequence[Parameter], path: str | Path) -> dict[str, Value]:
    """The values of a YAML file whose keys are parameters."""
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"there is no recipe {path}") from None
    except (yaml.YAMLError, ValueError, RecursionError):
        raise ValueError(f"the recipe {path} is not valid YAML") from None
    require(isinstance(recipe, dict), f"the recipe {path} must hold lines of 'name: value'")
    floats = {p.name for p in parameters if p.kind is float}
    try:
        return check_values(
            parameters, {k: _number(v) if k in floats else v for k, v in recipe.items()}
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_values(parameters: Sequence[Parameter], values: Mapping[str, Any]) -> dict[str, Value]:
    """`values` in their parameters' types; ValueError for an unknown name or a wrong type."""
    return {name: _named(parameters, str(name)).check(v) for name, v in values.items()}


def help_text(path: str | Path, parameters: Sequence[Parameter]) -> str:
    """What `--help` prints."""
    lines = [f"{Path(path).name} [--name value ...] [--config recipe.yaml]", ""]
    for p in parameters:
        flag = f"--{p.name}, --no-{p.name}" if p.kind is bool else f"--{p.name}"
        lines += [f"  {flag}  {p.annotation}, default {p.default!r}", f"      {p.help}"]
    return "\n".join(lines)
