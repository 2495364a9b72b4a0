"""The scaling model on paper: one step worked by hand, and the tables that the docs quote."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def model() -> ModuleType:
    import sys

    path = ROOT / "benchmarks" / "scaling_model.py"
    spec = importlib.util.spec_from_file_location("scaling_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_13b_on_eight_gpus_by_hand(model: ModuleType):
    step = model.step(model.OPT_13B, model.A100, 8)
    # 128 pairs a GPU of 512 tokens, 2 operations a weight, at half of 312e12 a second.
    forward = 2 * 512 * 128 * 13e9 / 156e12
    assert forward == pytest.approx(10.92, abs=0.01)
    critic = 2 * 512 * 128 * 0.35e9 / 156e12
    assert step.score == pytest.approx(forward + 2 * critic)
    assert step.train == pytest.approx(3 * forward + 4 * critic)
    # Four groups of two; each GPU holds 3.25 + 3.25 + 13 + 2.1 + 4 GB, so two have 100.8 GB for
    # rows of 512 tokens at 819,200 bytes.
    assert step.rows == 240
    read = 26e9 + 240 * 384 * 819_200
    decode = read / 2 / (2.039e12 * 0.7) + 80 * (20e-6 + 240 * 5120 * 2 / 240e9)
    prefill = 2 * 13e9 * 256 * 256 / 2 / 156e12
    assert step.generate == pytest.approx(256 / 240 * 256 * decode + prefill)


def test_a_model_that_does_not_fit_has_no_time(model: ModuleType):
    assert model.step(model.OPT_66B, model.A100, 1) is None


def test_the_docs_quote_what_the_script_prints(model: ModuleType):
    text = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    for table in model.tables().split("\n\n"):
        assert table in text
