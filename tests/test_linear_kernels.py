"""The Triton kernel for products of few rows, run by Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from rlhf_kit.hybrid_engine import linear_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bf16 matrices as if their bits were integers.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def case(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, ...]:
    """Input, a slice of a wider tensor, weight and bias."""
    chance = torch.Generator().manual_seed(rows + outputs)
    wide, weight, bias = (
        torch.randn(shape, generator=chance).to(DEVICE, HALF)
        for shape in ((rows, inputs + 16), (outputs, inputs), (outputs,))
    )
    return wide[:, :inputs], weight, bias


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("rows", "outputs"), [(1, 64), (16, 40), (33, 130), (70, 65)])
@pytest.mark.parametrize("relu", [False, True], ids=["as it is", "relu"])
def test_products_of_any_rows_and_outputs_equal_float64(
    rows: int, outputs: int, relu: bool
) -> None:
    input, weight, bias = case(rows, outputs, 256)
    expected = input.double() @ weight.double().T
    assert error(linear_kernels.linear(input, weight), expected) < 4e-3
    expected = expected + bias.double()
    out = torch.full((rows, outputs), torch.nan, device=DEVICE, dtype=HALF)
    linear_kernels.linear(input, weight, bias, relu=relu, out=out)
    assert error(out, expected.relu() if relu else expected) < 4e-3


def test_what_is_not_a_number_stays_so() -> None:
    input, weight, bias = case(2, 64, 128)
    weight[3, 5] = torch.nan
    for relu in (False, True):
        out = linear_kernels.linear(input, weight, bias, relu=relu)
        assert out.isnan().nonzero()[:, 1].tolist() == [3, 3]


@pytest.mark.parametrize("parts", [1, 2])
def test_a_product_adds_itself_to_what_is_there(parts: int) -> None:
    input, weight, _ = case(5, 70, 512)
    sums = torch.ones(5, 70, device=DEVICE, dtype=HALF)
    linear_kernels.linear(input, weight, out=sums, add=True, parts=parts)
    assert error(sums, 1 + input.double() @ weight.double().T) < 4e-3


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("rows", [5, 70])
def test_a_sum_in_parts_is_the_whole_one_again_and_again(parts: int, rows: int) -> None:
    input, weight, bias = case(rows, 70, 5 * 128)  # 5 tiles: no number of parts divides them
    expected = (input.double() @ weight.double().T + bias.double()).relu()
    first = linear_kernels.linear(input, weight, bias, relu=True, parts=parts)
    assert error(first, expected) < 4e-3
    for _ in range(2):  # what counts the parts is as it was
        again = linear_kernels.linear(input, weight, bias, relu=True, parts=parts)
        assert torch.equal(first, again)
    memory, _ = linear_kernels._kept[input.device]
    assert not memory.any()


def test_sums_are_cut_until_they_fill_a_gpu() -> None:
    parts = linear_kernels.parts_of
    assert parts(32, 2048) == parts(32, 8192) == parts(24, 8960) == 4  # 128, 128, 96 programs
    assert parts(64, 4096) == parts(80, 5120) == 2
    assert parts(96, 2048) == parts(128, 2048) == 1
    assert parts(12, 768) == 2  # two parts of three tiles each; four would be too short
