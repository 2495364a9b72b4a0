"""Kill at any instant: what goes on is what would have been, or says what it refused and why."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_integrity import calls_until_death
from tiny_training import Training, die, forked, manifest, saved, uninterrupted

from rlhf_kit import checkpoint_directory, integrity, signals, training_state
from rlhf_kit.metrics import read_metrics
from rlhf_kit.resume import Stopped

WEIGHTS, ROWS = uninterrupted(12)


def trained(directory: Path, until: int, **checkpoint: Any) -> Training:
    """A training that went on as far as `until`, and was forgotten there."""
    training = Training(directory, **checkpoint)
    training.resume()
    training.train(until)
    return training


def assert_as_uninterrupted(training: Training, steps: int) -> None:
    assert torch.equal(training.walk.weights, WEIGHTS[steps])
    assert training.rows() == ROWS[:steps]


# Going on ----------------------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_last_bit(tmp_path: Path, capsys: Any):
    def killed() -> None:
        training = Training(tmp_path)
        training.resume()
        training.train(12, inside=lambda step: die() if step == 8 else None)

    assert forked(killed) == -signal.SIGKILL
    training = Training(tmp_path)
    assert training.resume() == 6
    assert f"going on from {tmp_path}/sft/checkpoints/step-00000006\n" in capsys.readouterr().out
    training.train(12)
    assert_as_uninterrupted(training, 12)


def test_rows_after_the_checkpoint_are_logged_once(tmp_path: Path):
    training = trained(tmp_path, 7)
    samples = training.run.stage("sft") / "samples.jsonl"
    assert training.rows() == ROWS[:7] and not samples.exists()
    samples.write_text("of steps after the checkpoint\n")
    again = Training(tmp_path)
    assert again.resume() == 6
    assert samples.read_text() == ""
    again.train(9)
    assert_as_uninterrupted(again, 9)


def test_rows_that_were_logged_after_the_last_step_are_not_doubled(tmp_path: Path):
    training = trained(tmp_path, 6)
    training.log(6, {"loss/eval": 1.0})  # as a notebook does after the loop
    training.log.close()
    again = Training(tmp_path)
    assert again.resume() == 6
    again.log(6, {"loss/eval": 1.0})
    again.log.close()
    assert [row["step"] for row in read_metrics(again.log.path)] == [1, 2, 3, 4, 5, 6, 6]


def test_lost_rows_are_said_aloud(tmp_path: Path, capsys: Any):
    training = trained(tmp_path, 4)
    training.log.path.write_text("")
    Training(tmp_path).resume()
    assert "metrics.jsonl has lost rows that were written before" in capsys.readouterr().out


def test_all_generators_go_on(tmp_path: Path):
    import random

    import numpy as np

    def draw() -> list[float]:
        values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
        return [*values, float(torch.rand(()))]

    draw()  # an odd number of normal deviates: the other half of a pair is part of the state
    training = Training(tmp_path)
    training.resume()
    training.train(2)
    expected = draw()
    random.seed(0)
    np.random.seed(0)
    Training(tmp_path).resume()
    assert draw() == expected


def test_a_new_training_starts_anew_when_asked_to(tmp_path: Path, capsys: Any):
    trained(tmp_path, 6)
    (tmp_path / "sft" / "summary.json").write_text("{}")
    training = Training(tmp_path)
    assert training.resume(go_on=False) == 0
    assert "are deleted: training starts anew" in capsys.readouterr().out
    assert saved(tmp_path) == [] and not (tmp_path / "sft" / "summary.json").exists()
    training.train(3)
    assert_as_uninterrupted(training, 3)


def test_a_finished_stage_leaves_no_checkpoint_and_starts_anew(tmp_path: Path):
    training = trained(tmp_path, 6)
    training.checkpoints.finish()
    assert not (tmp_path / "sft" / "checkpoints").exists()
    assert Training(tmp_path).resume() == 0


def test_what_is_not_a_checkpoint_is_left_alone(tmp_path: Path):
    training = trained(tmp_path, 4)
    directory = tmp_path / "sft" / "checkpoints"
    for name in ("checkpoint-9999", "step-9", "step-00000099.bak", "mine"):
        (directory / name).mkdir()
    (directory / "step-00000098").write_text("a file")
    assert Training(tmp_path).resume() == 4
    training.checkpoints.finish()
    assert {path.name for path in directory.iterdir()} == {
        *("checkpoint-9999", "step-9", "step-00000099.bak", "mine", "step-00000098"),
    }


def test_the_pointer_is_a_hint_and_never_believed(tmp_path: Path):
    trained(tmp_path, 4)
    latest = tmp_path / "sft" / "checkpoints" / "latest"
    assert latest.read_text() == "step-00000004\n"
    latest.write_text("step-00000002\n")
    assert Training(tmp_path).resume() == 4
    latest.unlink()
    assert Training(tmp_path).resume() == 4


# Refusing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torn", "bit flip", "missing shard", "extra file", "no manifest"])
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, capsys: Any, kind: str
):
    trained(tmp_path, 4)
    newest = tmp_path / "sft" / "checkpoints" / "step-00000004"
    content = bytearray((newest / "rank-0.safetensors").read_bytes())
    if kind == "torn":
        (newest / "rank-0.safetensors").write_bytes(content[:100])
    elif kind == "bit flip":
        content[-3] ^= 4
        (newest / "rank-0.safetensors").write_bytes(content)
    elif kind == "missing shard":
        (newest / "rank-0.safetensors").unlink()
    elif kind == "extra file":
        (newest / "rank-1.safetensors").write_bytes(content)
    else:
        (newest / "manifest.json").unlink()
    training = Training(tmp_path)
    assert training.resume() == 2
    out = capsys.readouterr().out
    assert f"refused: {newest}" in out and "going on from" in out.split("refused:")[1]
    assert (newest.parent / "refused-step-00000004").is_dir() and saved(tmp_path) == [2]
    training.train(6)
    assert_as_uninterrupted(training, 6)


def test_shards_of_two_checkpoints_are_never_mixed(tmp_path: Path, capsys: Any):
    trained(tmp_path, 4)
    one, other = (tmp_path / "sft" / "checkpoints" / f"step-0000000{n}" for n in (2, 4))
    shutil.copy(one / "rank-0.safetensors", other)
    assert Training(tmp_path).resume() == 2
    assert "step-00000004: rank-0.safetensors was changed" in capsys.readouterr().out


def test_without_any_whole_checkpoint_training_starts_anew(tmp_path: Path, capsys: Any):
    trained(tmp_path, 4)
    for path in (tmp_path / "sft" / "checkpoints").glob("step-*"):
        (path / "manifest.json").write_text("{")
    training = Training(tmp_path)
    assert training.resume() == 0
    assert capsys.readouterr().out.count("refused:") == 2
    training.train(3)
    assert_as_uninterrupted(training, 3)


def test_another_trainings_checkpoint_is_refused_with_the_first_difference(tmp_path: Path):
    trained(tmp_path, 4)
    sentence = (
        f"{tmp_path}/sft/checkpoints/step-00000004 is of an unfinished training with other "
        "settings: seed was 1 and is 2; set it back to go on, or start anew with resume=False "
        "(as a flag: --no-resume)"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Training(tmp_path, changes={"seed": 2}).resume()
    with pytest.raises(ValueError, match="sft.optimizer.learning_rate was 0.001 and is 0.002"):
        Training(tmp_path, changes={"sft__optimizer__learning_rate": 0.002}).resume()
    assert saved(tmp_path) == [4, 2]


def test_how_often_to_save_and_how_to_share_the_work_may_change(tmp_path: Path, capsys: Any):
    trained(tmp_path, 4)
    assert Training(tmp_path, every_steps=3, changes={"evaluation__prompts": 9}).resume() == 4
    assert "within rounding" not in capsys.readouterr().out
    assert Training(tmp_path, changes={"actor_engine__zero_stage": 2}).resume() == 4
    assert (
        "actor_engine.zero_stage was 0 and is 2: equal within rounding, not to the bit"
        in capsys.readouterr().out
    )


def test_other_rows_and_another_format_are_refused(tmp_path: Path, monkeypatch: Any):
    training = trained(tmp_path, 4)
    other = type(training.checkpoints)(
        training.run, "sft", {"walk": training.walk}, data=[["another row"]]
    )
    with pytest.raises(ValueError, match="rows of data was "):
        other.resume()
    monkeypatch.setattr(checkpoint_directory, "FORMAT", 2)
    with pytest.raises(ValueError, match="format was 1 and is 2"):
        Training(tmp_path).resume()


def test_a_directory_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path):
    training = Training(tmp_path)
    (tmp_path / "sft" / "checkpoints").write_text("in the way")
    with pytest.raises(ValueError, match="checkpoints can't be written .*choose another run_dir"):
        training.resume()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be made .*choose another run_dir"):
        Training(tmp_path / "file")


def test_two_processes_never_train_one_stage(tmp_path: Path):
    training = Training(tmp_path)
    training.resume()

    def second() -> None:
        checkpoint_directory._held.clear()  # what a process of its own has not
        with pytest.raises(ValueError, match="another process is training in .*/sft; wait for it"):
            Training(tmp_path).resume()

    assert forked(second) == 0
    training.train(2)
    training.checkpoints.finish()
    assert forked(lambda: Training(tmp_path).resume()) == 0


# Keeping -----------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path: Path):
    trained(tmp_path, 12, every_steps=1)
    losses = dict(ROWS)
    best = min(losses, key=lambda step: losses[step])
    assert 1 <= best <= 10, "the best of this walk is not among the newest"
    assert saved(tmp_path) == [12, 11, best]
    path = tmp_path / "sft" / "checkpoints" / f"step-{best:08d}"
    assert manifest(path)["metric"] == pytest.approx(losses[best])


def test_without_the_best_only_the_newest_are_kept(tmp_path: Path):
    trained(tmp_path, 9, every_steps=1, keep_last=3, keep_best=False)
    assert saved(tmp_path) == [9, 8, 7]


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(
        integrity, "remove", lambda _: (_ for _ in ()).throw(PermissionError(13, "denied"))
    )
    training = trained(tmp_path, 8, keep_best=False)
    assert saved(tmp_path) == [8, 6, 4, 2]
    assert_as_uninterrupted(training, 8)


def test_the_clock_asks_for_checkpoints_too(tmp_path: Path, monkeypatch: Any):
    now = [0.0]
    monkeypatch.setattr("rlhf_kit.resume.time", SimpleNamespace(monotonic=lambda: now[0]))
    training = Training(tmp_path, every_steps=0, every_minutes=2.0, keep_last=9)
    training.resume()

    def a_minute_later(step: int) -> None:
        now[0] += 60.0

    training.train(5, inside=a_minute_later)
    assert saved(tmp_path) == [4, 2]


def test_rolling_back_gives_the_models_back_and_leaves_the_place(tmp_path: Path):
    training = Training(tmp_path)
    training.resume()
    assert training.checkpoints.roll_back() is None
    training.train(5)
    assert training.checkpoints.roll_back() == 4
    assert torch.equal(training.walk.weights, WEIGHTS[4])
    assert training.checkpoints.done == 5 and training.rows() == ROWS[:5]


# Saving that fails -------------------------------------------------------------------------


def test_a_full_disk_costs_the_checkpoint_and_nothing_else(tmp_path: Path, monkeypatch: Any):
    """As after `ulimit -f`: what is larger than the limit fails as on a full disk."""

    def said(sentence: str) -> None:
        with (tmp_path / "said").open("a") as file:
            file.write(sentence)

    def starved() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        monkeypatch.setattr("rlhf_kit.resume._say", said)
        training = Training(tmp_path, size=100_000)
        training.resume()

        def starve(step: int) -> None:
            if step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        training.train(5, inside=starve)
        assert training.checkpoints.done == 5

    assert forked(starved) == 0
    assert "a checkpoint of sft could not be saved:" in (tmp_path / "said").read_text()
    assert saved(tmp_path) == [2]
    integrity.verify(tmp_path / "sft" / "checkpoints" / "step-00000002")
    assert not list((tmp_path / "sft" / "checkpoints").glob(".*"))


def test_without_room_a_checkpoint_is_not_begun(tmp_path: Path, monkeypatch: Any, capsys: Any):
    training = trained(tmp_path, 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    training.train(5)
    assert "a checkpoint of sft could not be saved: " in capsys.readouterr().out
    assert saved(tmp_path) == [2]
    assert_as_uninterrupted(training, 5)


POINTS = [
    (training_state, "write"),
    (integrity, "seal"),
    (integrity, "publish"),
    (integrity, "write_file"),
    (checkpoint_directory.CheckpointDirectory, "prune"),
]


@pytest.mark.parametrize(
    ("place", "name"), POINTS, ids=lambda value: getattr(value, "__name__", value)
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_at_each_point_of_the_protocol_loses_at_most_that_checkpoint(
    tmp_path: Path, monkeypatch: Any, place: Any, name: str, when: str
):
    def killed() -> None:
        training = trained(tmp_path, 4)
        real = getattr(place, name)

        def dying(*arguments: Any, **keywords: Any) -> None:
            if when == "after":
                real(*arguments, **keywords)
            die()

        monkeypatch.setattr(place, name, dying)
        training.train(8)

    assert forked(killed) == -signal.SIGKILL
    training = Training(tmp_path)
    assert training.resume() in (4, 6)
    assert not list((tmp_path / "sft" / "checkpoints").glob(".*"))
    training.train(8)
    assert_as_uninterrupted(training, 8)


@pytest.mark.parametrize("count", range(1, 14, 3))
def test_a_kill_at_any_write_to_the_disk_loses_at_most_that_checkpoint(
    tmp_path: Path, monkeypatch: Any, count: int
):
    def killed() -> None:
        training = trained(tmp_path, 4)
        calls_until_death(monkeypatch, "fsync", count)
        training.train(12)

    assert forked(killed) == -signal.SIGKILL
    training = Training(tmp_path)
    assert training.resume() >= 4
    training.train(12)
    assert_as_uninterrupted(training, 12)


def test_the_copy_is_taken_before_training_goes_on(tmp_path: Path, monkeypatch: Any):
    written, may_write = training_state.write, threading.Event()

    def late(*arguments: Any, **keywords: Any) -> None:
        assert may_write.wait(30)
        written(*arguments, **keywords)

    monkeypatch.setattr(training_state, "write", late)
    training = Training(tmp_path)
    training.resume()
    at_3 = lambda step: may_write.set() if step == 3 else None  # noqa: E731
    training.train(3, inside=at_3, overlapping=True)
    again = Training(tmp_path)
    assert again.resume() == 2
    assert torch.equal(again.walk.weights, WEIGHTS[2])


# Signals -----------------------------------------------------------------------------------


def signalled(directory: Path, send: Callable[[int, int], None], **checkpoint: Any) -> int:
    """A training of 12 steps in a process of its own that waits for `send(pid, step)`."""
    ready, ready_ = os.pipe()
    go, go_ = os.pipe()

    def act() -> None:
        training = Training(directory, every_steps=0, **checkpoint)
        training.resume()

        def ask(step: int) -> None:
            os.write(ready_, bytes([step]))
            os.read(go, 1)

        training.train(12, inside=ask)

    def meanwhile(pid: int) -> None:
        os.close(ready_)
        while step := os.read(ready, 1):
            send(pid, step[0])
            os.write(go_, b".")

    code = forked(act, meanwhile=meanwhile)
    for end in (ready, go, go_):
        os.close(end)
    return code


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)]
)
def test_a_signal_saves_at_the_next_step(tmp_path: Path, number: signal.Signals, code: int):
    assert signalled(tmp_path, lambda p, step: os.kill(p, number) if step == 5 else None) == code
    assert saved(tmp_path) == [5]
    training = Training(tmp_path)
    assert training.resume() == 5
    training.train(12)
    assert_as_uninterrupted(training, 12)


def test_one_signal_that_comes_twice_is_one(tmp_path: Path):
    def send(pid: int, step: int) -> None:
        if step == 5:  # from the terminal, and from a launcher that passes it on
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)

    assert signalled(tmp_path, send) in (143, 130)
    assert saved(tmp_path) == [5]


def test_a_second_signal_ends_it_at_once(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(signals, "SAME_SECONDS", -1.0)
    assert signalled(tmp_path, send_twice) == -signal.SIGTERM
    assert saved(tmp_path) == []


def send_twice(pid: int, step: int) -> None:
    if step == 5:  # two kinds, since two of one kind may become one on their way
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)


def test_handlers_are_there_only_while_the_loop_runs(tmp_path: Path):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    training = Training(tmp_path)
    training.resume()

    def look(step: int) -> None:
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
        if step == 2:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        training.train(3, inside=look)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_kernel_saves_and_then_is_interrupted(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("rlhf_kit.resume.in_notebook", lambda: True)
    training = Training(tmp_path, every_steps=0)
    training.resume()
    with pytest.raises(KeyboardInterrupt):
        training.train(5, inside=lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None)
    assert saved(tmp_path) == [3]
    assert Training(tmp_path).resume() == 3


def test_between_two_halves_of_a_step_a_signal_saves_what_is_done(tmp_path: Path):
    training = Training(tmp_path, every_steps=0)
    training.resume()

    def half(step: int) -> None:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
            training.checkpoints.between()

    with pytest.raises(Stopped) as stopped:
        training.train(5, inside=half)
    assert stopped.value.code == 143 and saved(tmp_path) == [3]
