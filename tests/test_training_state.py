"""States written by many ranks and read by as many or others, without pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_kit.training_state import Fragment, State, read, snapshot, write

WHOLE = torch.arange(12.0)


def save(directory: Path, *states: State) -> Path:
    for rank, state in enumerate(states):
        write(snapshot(state), directory, rank=rank)
    return directory


def part(start: int, end: int) -> Fragment:
    return Fragment(WHOLE[start:end], start, (3, 4))


def test_a_state_comes_back_with_its_nesting_and_its_values(tmp_path: Path):
    state = {
        "engine": {"weights": {"lm_head.weight": part(0, 12)}, "steps": 7, "rate": 0.1},
        "none": None,
        "rows": [1, [2.5, "x"], {"a": True}],
        "metrics": {"objective/kl": 1.5, "a~b": 2},
        "empty": {},
    }
    found = read(save(tmp_path, state), rank=0, ranks=1)
    weights = found["engine"]["weights"].pop("lm_head.weight")
    assert weights.shape == (3, 4) and torch.equal(weights.read(0, 12), WHOLE)
    state["engine"]["weights"] = {}
    assert found == state


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).bfloat16(),
        torch.tensor(3.5),
        torch.arange(5),
        torch.arange(6, dtype=torch.uint8),
        torch.tensor([True, False]),
        torch.empty(0, 3),
        torch.randn(4, 6).t(),
        torch.randn(8)[::2],
    ],
    ids=lambda t: f"{t.dtype}-{list(t.shape)}",
)
def test_every_tensor_comes_back_to_the_last_bit(tensor: torch.Tensor, tmp_path: Path):
    found = read(save(tmp_path, {"own": {"of/rank": tensor}}), rank=0, ranks=1)["own"]["of/rank"]
    assert torch.equal(found, tensor) and found.dtype == tensor.dtype


def test_fragments_of_many_ranks_are_read_in_any_pieces(tmp_path: Path):
    states = [{"w": part(0, 5)}, {}, {"w": part(5, 6)}, {"w": part(6, 12)}]
    stored = read(save(tmp_path, *states), rank=0, ranks=2)["w"]
    for start in range(12):
        for end in range(start, 13):
            assert torch.equal(stored.read(start, end - start), WHOLE[start:end])


def test_ranks_may_hand_over_the_same_elements(tmp_path: Path):
    stored = read(save(tmp_path, {"w": part(0, 8)}, {"w": part(2, 12)}), rank=0, ranks=2)["w"]
    assert torch.equal(stored.read(0, 12), WHOLE)


def test_what_no_rank_has_saved_is_an_error_by_name(tmp_path: Path):
    save(tmp_path, {"engine": {"w": part(0, 5)}}, {"engine": {"w": part(7, 12)}})
    stored = read(tmp_path, rank=0, ranks=2)["engine"]["w"]
    assert torch.equal(stored.read(7, 5), WHOLE[7:])
    with pytest.raises(ValueError, match="engine/w: elements 5 to 9 are in no rank's file"):
        stored.read(3, 6)
    with pytest.raises(ValueError, match="elements 12 to 13 are in no rank's file"):
        stored.read(12, 1)


def test_a_fragment_of_nothing_keeps_its_type(tmp_path: Path):
    empty = Fragment(torch.empty(0, dtype=torch.bfloat16), 0, (0,))
    stored = read(save(tmp_path, {"w": empty}), rank=0, ranks=1)["w"]
    assert stored.read(0, 0).dtype == torch.bfloat16


def test_a_ranks_own_tensors_are_its_own_and_only_on_as_many_ranks(tmp_path: Path):
    states = [{"own": torch.tensor([rank]), "n": rank} for rank in range(2)]
    states[1]["more"] = {"x": torch.tensor([9])}
    save(tmp_path, *states)
    one, two = (read(tmp_path, rank=rank, ranks=2) for rank in range(2))
    assert (one["own"].tolist(), two["own"].tolist()) == ([0], [1])
    assert one["n"] == two["n"] == 0  # JSON is the main rank's
    assert one["more"] == {"x": None} and two["more"]["x"].tolist() == [9]
    for ranks in (1, 3):
        assert read(tmp_path, rank=0, ranks=ranks)["own"] is None


def test_a_snapshot_is_cut_off_from_what_goes_on(tmp_path: Path):
    weights = torch.ones(3)
    taken = snapshot({"w": Fragment(weights, 0, (3,)), "own": weights})
    assert taken.size == 24
    weights += 1
    write(taken, tmp_path, rank=0)
    found = read(tmp_path, rank=0, ranks=1)
    assert found["own"].tolist() == found["w"].read(0, 3).tolist() == [1, 1, 1]


def test_what_neither_json_nor_safetensors_holds_is_a_mistake_with_its_place():
    with pytest.raises(AssertionError, match="engine/seen is of type set"):
        snapshot({"engine": {"seen": {1}}})
    with pytest.raises(AssertionError, match="list is of type list"):
        snapshot({"list": [torch.ones(1)]})


def test_the_files_are_safetensors_and_json(tmp_path: Path):
    save(tmp_path, {"w": part(0, 12), "n": 1}, {"own": torch.ones(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "rank-0.safetensors",
        "rank-1.safetensors",
        "state.json",
    ]
    assert json.loads((tmp_path / "state.json").read_text()) == {"n": 1}
    (tmp_path / "rank-1.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="rank-1.safetensors is no part of a checkpoint"):
        read(tmp_path, rank=0, ranks=2)
