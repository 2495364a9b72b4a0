"""Two ranks save and go on together: what one of them is told or can't do, both act on.

Two processes run this file as a program.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Training, manifest, saved

from rlhf_kit import distributed, integrity, training_state
from rlhf_kit.resume import Stopped
from rlhf_kit.training_state import Fragment, State

SIZE = 6


class SharedWalk:
    """Each rank has a part of the weights and a generator of its own."""

    def __init__(self) -> None:
        self.start = SIZE * distributed.rank() // distributed.world_size()
        end = SIZE * (distributed.rank() + 1) // distributed.world_size()
        torch.manual_seed(distributed.rank())
        self.weights = torch.zeros(end - self.start)
        self.drawn = torch.zeros(1)

    def step(self) -> dict[str, float]:
        self.drawn = torch.randn(1)
        self.weights += torch.randn(self.weights.shape)
        return {"loss/train": 1.0}

    def state(self) -> State:
        return {"w": Fragment(self.weights, self.start, (SIZE,)), "drawn": self.drawn}

    def load_state(self, state: State) -> None:
        self.weights.copy_(state["w"].read(self.start, len(self.weights)))
        if state["drawn"] is not None:
            self.drawn.copy_(state["drawn"])


def start(directory: Path, **keywords: Any) -> Training:
    training = Training(directory, walk=SharedWalk(), **keywords)
    training.resume()
    return training


def on_each_rank(work: Path) -> dict[str, Any]:
    """What one rank sees; the other does the same at the same time."""
    found: dict[str, Any] = {}
    straight = SharedWalk()
    for _ in range(8):
        straight.step()

    start(work / "killed").train(5)
    training = start(work / "killed")
    found["went on from"] = training.checkpoints.done
    training.train(8)
    found["equal"] = torch.equal(training.walk.weights, straight.weights)
    found["own"] = torch.equal(training.walk.drawn, straight.drawn)
    found["weights"] = straight.weights.tolist()

    def told(step: int) -> None:
        if step == 3 and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    try:
        start(work / "told", every_steps=0).train(8, inside=told)
    except Stopped as stopped:
        found["stopped"] = stopped.code

    written = training_state.write

    def fails_on_rank_1(*arguments: Any, **keywords: Any) -> None:
        if distributed.rank() == 1:
            raise OSError(28, "No space left on device")
        written(*arguments, **keywords)

    training_state.write = fails_on_rank_1
    training = start(work / "full")
    training.train(3)
    training_state.write = written
    training.train(6)
    found["after a full disk"] = training.checkpoints.done

    try:
        start(work / "killed", changes={"seed": 2})
    except ValueError as error:
        found["refused"] = str(error)
    training.checkpoints.finish()
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both ranks have done all of `on_each_rank` here."""
    work = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(work)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "".join(outputs)[-3000:]
    (work / "said").write_text(outputs[0])
    assert outputs[1] == "", "the main rank speaks for all"
    return work


def results(work: Path) -> list[dict[str, Any]]:
    return [json.loads((work / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_ranks_go_on_with_their_own_parts_to_the_last_bit(work: Path):
    for found in results(work):
        assert (found["went on from"], found["equal"], found["own"]) == (4, True, True)
    newest = work / "killed" / "sft" / "checkpoints" / "step-00000008"
    assert set(integrity.verify(newest)["sha256"]) == {
        *("state.json", "rank-0.safetensors", "rank-1.safetensors"),
    }


def test_a_signal_to_one_rank_stops_both_after_saving(work: Path):
    assert [found["stopped"] for found in results(work)] == [143, 143]
    assert saved(work / "told") == [3]
    assert (
        manifest(work / "told" / "sft" / "checkpoints" / "step-00000003")["sharing"]["ranks"] == 2
    )


def test_a_rank_that_cannot_write_costs_the_checkpoint_and_nothing_else(work: Path):
    assert [found["after a full disk"] for found in results(work)] == [6, 6]
    said = (work / "said").read_text()
    assert "a checkpoint of sft could not be saved: [Errno 28] No space left on device" in said


def test_what_the_main_rank_refuses_all_refuse(work: Path):
    one, other = (found["refused"] for found in results(work))
    assert one == other and "seed was 1 and is 2" in one


def test_one_rank_goes_on_with_what_two_have_saved(work: Path, capsys: Any):
    training = start(work / "killed")
    assert training.checkpoints.done == 8
    parts = [found["weights"] for found in results(work)]
    assert training.walk.weights.tolist() == parts[0] + parts[1]
    assert "ranks was 2 and is 1: equal within rounding" in capsys.readouterr().out


if __name__ == "__main__":
    place = Path(sys.argv[1])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.FileStore(str(place / "store"), ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    result = on_each_rank(place)
    (place / f"{distributed.rank()}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
