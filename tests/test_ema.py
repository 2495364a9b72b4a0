"""The average of the weights; under every ZeRO stage in tests/test_training.py."""

from __future__ import annotations

import pytest
import torch
from conftest import copied, same_weights
from torch import nn

from rlhf_kit.config import EMAConfig
from rlhf_kit.ema import EMA


def test_the_average_of_three_weights_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(model, EMAConfig(decay=0.9, warmup=False))
        for value in (2.0, 4.0):
            model.weight.fill_(value)
            assert ema.update() == 0.9
    # 0.9 x (0.9 x 1 + 0.1 x 2) + 0.1 x 4
    with ema.swapped_in():
        assert model.weight.item() == pytest.approx(1.39)
    assert model.weight.item() == 4.0
    assert ema.distance() == pytest.approx((4.0 - 1.39) / 4.0)


def test_the_warm_up_lets_the_first_steps_count():
    model = nn.Linear(2, 2)
    ema = EMA(model, EMAConfig(decay=0.992, warmup=True))
    assert [ema.update() for _ in range(3)] == pytest.approx([1 / 10, 2 / 11, 3 / 12])


def test_a_bf16_average_keeps_steps_that_bf16_would_round_away():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(model, EMAConfig(decay=0.992, warmup=False))
        model.weight.fill_(1.0078125)  # the next number that bf16 has
        for _ in range(50):
            ema.update()
    # 1 + 2^-7 (1 - 0.992^50), between two bf16 numbers
    assert ema._averages[0].item() == pytest.approx(1 + 0.0078125 * (1 - 0.992**50), abs=1e-6)
    assert ema._averages[0].dtype == torch.float32


def test_weights_come_back_to_the_last_bit_even_after_an_error():
    model = nn.Linear(3, 3)
    ema = EMA(model, EMAConfig())
    with torch.no_grad():
        model.weight.mul_(1.1)
    before = copied(model)
    with pytest.raises(RuntimeError), ema.swapped_in():
        assert not same_weights(before, copied(model))
        raise RuntimeError
    assert same_weights(before, copied(model))


def test_frozen_weights_are_not_averaged():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    ema = EMA(model, EMAConfig())
    assert len(ema._averages) == 1
    with torch.no_grad():
        model.weight.add_(1.0)
    bias = model.bias.clone()
    with ema.swapped_in():
        assert torch.equal(model.bias, bias)


def test_a_checkpoint_without_our_weights_is_refused():
    ema = EMA(nn.Linear(3, 3), EMAConfig())
    with pytest.raises(ValueError, match="no average of weight; resume with the model"):
        ema.load_state({"updates": 1, "averages": {}})
