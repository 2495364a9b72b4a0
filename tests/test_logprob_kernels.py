"""The Triton kernels for logprobs, run by Triton's interpreter, against float64 autograd."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from rlhf_kit import logprob_kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
FORMS = [(1.0, None, 1.0), (0.5, None, 0.7), (1.0, 3.0, 1.0), (2.0, 5.0, 1.3)]


@pytest.mark.parametrize("vocabulary", [7, 4096, 5000])
@pytest.mark.parametrize(("factor", "softcap", "temperature"), FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=["single", "half"])
def test_logprobs_entropies_and_gradients_equal_float64(
    vocabulary, factor, softcap, temperature, dtype
):
    chance = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(5, vocabulary, generator=chance)).to(DEVICE, dtype)
    ids = torch.randint(vocabulary, (5,), generator=chance).to(DEVICE)
    outer = torch.randn(5, generator=chance).to(DEVICE)

    exact = logits.double().requires_grad_()
    formed = exact * factor
    if softcap is not None:
        formed = softcap * torch.tanh(formed / softcap)
    distribution = torch.distributions.Categorical(logits=formed / temperature)
    expected = distribution.log_prob(ids)
    (expected * outer).sum().backward()

    result, normalizers = torch.empty(5, 2, device=DEVICE), torch.empty(5, device=DEVICE)
    settings = {"factor": factor, "softcap": softcap, "temperature": temperature}
    logprob_kernels.logprobs(logits, ids, result, normalizers, **settings)
    torch.testing.assert_close(result[:, 0].double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        result[:, 1].double(), distribution.entropy().detach(), rtol=1e-4, atol=1e-4
    )
    grad = logprob_kernels.gradient(logits, ids, normalizers, outer, **settings)
    assert grad.data_ptr() == logits.data_ptr()
    assert exact.grad is not None
    error = (grad.double() - exact.grad).norm() / exact.grad.norm()
    assert float(error) < (1e-5 if dtype == torch.float32 else 4e-3)


def test_a_logit_far_above_the_others_gives_no_infinity():
    logits = torch.zeros(2, 9, device=DEVICE)
    logits[0, 3], logits[1, 8] = 1e4, -1e4
    result, normalizers = torch.empty(2, 2, device=DEVICE), torch.empty(2, device=DEVICE)
    ids = torch.tensor([3, 8], device=DEVICE)
    settings = {"factor": 1.0, "softcap": None, "temperature": 1.0}
    logprob_kernels.logprobs(logits, ids, result, normalizers, **settings)
    # The first is certain; the second is one of nothing beside eight equal ones.
    assert result[0].tolist() == [0.0, 0.0]
    assert result[1, 1].item() == pytest.approx(2.0794415, abs=1e-5)  # log 8
    grad = logprob_kernels.gradient(logits, ids, normalizers, torch.ones(2).to(DEVICE), **settings)
    assert bool(grad.isfinite().all())
