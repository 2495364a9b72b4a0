"""The command `rlhf-kit`: train, run, launch, plan, chat, app, report, data.

Nothing heavy is imported before it is needed. Wrong input is one sentence and exit code 2, a
stage that fails is exit code 1, Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rlhf_kit import (
    __version__,
    data_command,
    deployment,
    launch_command,
    pipeline,
    plan_command,
    run_flags,
)
from rlhf_kit.config import require


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a usage block for wrong input."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rlhf-kit",
        description="Train a ChatGPT-style model: SFT, reward model, PPO.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rlhf-kit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, text: str, *, among: Any = commands, **keywords: Any
    ) -> argparse.ArgumentParser:
        sub = among.add_parser(name, help=text, description=text, allow_abbrev=False, **keywords)
        sub.set_defaults(run=run)
        return sub

    train_ = command("train", train, "run all three stages and print the report")
    run_flags.add(train_)
    train_.add_argument(
        "--output-dir", metavar="DIR", type=Path, required=True, help="where the run is written"
    )
    train_.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in DIR, inside the stage too, or start it where there is none",
    )
    deployment.add(train_)

    run_ = command("run", run, "run one notebook as a script; its own --help lists its flags")
    run_.add_argument("notebook", help="a .py (py:percent) or .ipynb")
    run_.add_argument("flags", nargs=argparse.REMAINDER, help="its parameters: --name value ...")

    launch_command.add(command)
    plan_command.add(command)

    report_ = command("report", report, "build and print the report of a run again")
    report_.add_argument("run_dir", metavar="DIR", type=Path)

    chat_ = command("chat", chat, "talk to a model in the terminal")
    chat_.add_argument("directory", metavar="DIR", type=Path, help="a model, or a run")
    chat_.add_argument(
        "--checkpoint",
        choices=("base", "sft", "final", "ema"),
        help="which model of a run; default: final",
    )
    chat_.add_argument("--system", metavar="TEXT", default="", help="a system message")
    chat_.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default: 0.7)")
    chat_.add_argument("--top-p", type=float, default=0.9, help="nucleus (default: 0.9)")
    chat_.add_argument("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    chat_.add_argument("--seed", type=int, default=0, help="the same seed, the same answers")

    app_ = command("app", app, "open the app: chat in the browser, compare checkpoints, vote")
    app_.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run, or a model")
    app_.add_argument("--port", type=int, metavar="N", help="default: the first free from 7860")
    app_.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="where to listen; another than this machine's own needs a password",
    )
    app_.add_argument(
        "--share", action="store_true", help="a public link through Gradio; needs a password"
    )
    app_.add_argument("--language", choices=("en", "zh"), help="default: the browser's")

    data_ = command("data", None, "look after data: check it, look at it, make it from votes")
    data_commands = data_.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    data_command.add(command, data_commands)
    votes_ = command(
        "from-votes",
        data_from_votes,
        "turn the app's votes into prompt/chosen/rejected, which --data takes",
        among=data_commands,
    )
    votes_.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    votes_.add_argument(
        "--output", metavar="FILE", type=Path, help="default: RUN_DIR/preferences.jsonl"
    )
    return parser


# ---- the commands


def train(arguments: argparse.Namespace) -> int:
    directory: Path = arguments.output_dir
    is_new = not (directory / "run.json").is_file()
    changes, name = run_flags.changes(arguments), arguments.preset
    pipeline.require_free(directory, resume=arguments.resume)
    if not is_new:
        deployment.recall(arguments, pipeline.read_record(directory))
    place = deployment.Deployment.of(arguments)
    if place is not None:
        if not arguments.dry_run:
            place.check()
        if is_new:
            name = name or "consumer"
            changes = deployment.choose(place, name, changes)
        if arguments.dry_run:
            print(place.preview())
            return 0
    record = pipeline.open_run(
        directory,
        preset_name=name,
        changes=changes,
        resume=arguments.resume,
        command=shlex.join(["rlhf-kit", *sys.argv[1:]]),
        deployment=place and place.to_dict(),
    )
    if place is not None and arguments.slurm and place.left():
        place.submit()
        print(f"the jobs run one after the other; then: rlhf-kit report {directory}")
        return 0
    was_finished = record["finished"] is not None
    if was_finished:
        print(f"{directory} holds a finished run; its report again:", flush=True)
    elif code := pipeline.train(directory, record, is_new=is_new, run=place and place.run_stage):
        if code in pipeline.STOPPED:
            print(f"stopped; {_way_on(directory)}", file=sys.stderr)
        return code
    show_report(directory, written=was_finished and (directory / "report.json").is_file())
    print(f"{directory}: {pipeline.duration(pipeline.seconds_of(record))} of training in all")
    return 0


def _way_on(directory: Path) -> str:
    return f"go on with: rlhf-kit train --output-dir {directory} --resume"


def run(arguments: argparse.Namespace) -> int:
    from rlhf_kit.launch import run_notebook
    from rlhf_kit.parameters import help_text, parameters_of, parse_flags

    notebook = arguments.notebook
    parameters = parameters_of(notebook)
    if {"-h", "--help"} & set(arguments.flags):
        print(help_text(notebook, parameters))
        return 0
    values = parse_flags(parameters, arguments.flags)
    log = Path("runs", "logs", Path(notebook).stem + ".log")
    code = run_notebook(notebook, values, log=log)
    if code not in (0, 2):  # 2: the notebook itself has said in one sentence what is wrong
        print(f"error: {notebook} {pipeline.ending(code)}", file=sys.stderr)
    if code:
        print(f"The whole log is {log}.", file=sys.stderr)
    return code if code in (0, 2) else 1


def report(arguments: argparse.Namespace) -> int:
    show_report(arguments.run_dir)
    return 0


def show_report(directory: Path, *, written: bool = False) -> None:
    """Evaluate the run and print its report; with `written`, print the one that is there."""
    pipeline.read_record(directory)

    from rlhf_kit.report import print_terminal

    if written:
        from rlhf_kit.report import load as read
    else:
        from rlhf_kit.report import build as read
    print_terminal(read(directory))


def chat(arguments: argparse.Namespace) -> int:
    from rlhf_kit.chat import talk
    from rlhf_kit.config import GenerationConfig

    generation = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        slots=1,
    )
    return talk(
        arguments.directory,
        checkpoint=arguments.checkpoint,
        generation=generation,
        seed=arguments.seed,
        system=arguments.system,
    )


def app(arguments: argparse.Namespace) -> int:
    root = pipeline.NOTEBOOKS.parent
    require(
        (root / "apps" / "chat.py").is_file(),
        f"there is no app in {root}; start it from a checkout of the repository, installed with "
        "pip install -e .",
    )
    require(
        importlib.util.find_spec("gradio") is not None,
        "the app needs Gradio, which is not installed: pip install -e '.[app]'",
    )
    port = arguments.port
    require(port is None or 0 < port < 65536, f"--port must be from 1 to 65535, not {port}")
    sys.path.insert(0, str(root))  # apps/ is run from the checkout, as the notebooks are
    chat_app = importlib.import_module("apps.chat")
    return chat_app.main(
        arguments.run_dir,
        host=arguments.host,
        port=port,
        share=arguments.share,
        language=arguments.language,
    )


def data_from_votes(arguments: argparse.Namespace) -> int:
    from rlhf_kit.votes import from_votes

    result, path = from_votes(arguments.run_dir, arguments.output)
    print(f"{path}: {len(result.pairs)} pairs from {result.votes} votes")
    for line in result.lines():
        print(f"  {line}")
    print(f"Train on them with --data {path}")
    return 0


def main(words: Sequence[str] | None = None) -> int:
    words, flags = launch_command.split(sys.argv[1:] if words is None else words)
    arguments = build_parser().parse_args(words)
    arguments.flags = flags or getattr(arguments, "flags", [])
    try:
        return arguments.run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a name too long, a directory that may not be read
        print(f"error: {error.strerror or error}: {error.filename}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ""
        if arguments.command == "train":
            hint = f"; {_way_on(arguments.output_dir)}"
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
