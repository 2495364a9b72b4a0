"""Chunked logprobs against the softmax over whole logits, in value, gradient and memory.

Shapes: B batch, T sequence tokens, N chosen tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_kit import functional as f
from rlhf_kit.config import EngineConfig, LoRAConfig, OptimizerConfig
from rlhf_kit.hybrid_engine.training import TrainingEngine
from rlhf_kit.models import add_lora
from rlhf_kit.token_logprobs import LogitForm, chosen_logprobs, chunked_logprobs, logit_form

N, D, V = 23, 16, 57
FORMS = [LogitForm(), LogitForm(0.25), LogitForm(1.0, 5.0), LogitForm(3.0, 5.0)]
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 16},
    "gpt_neox": {"intermediate_size": 48},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16, "num_key_value_heads": 1},
    "granite": {"logits_scaling": 4.0, "num_key_value_heads": 1},
    "cohere": {"logit_scale": 0.5, "num_key_value_heads": 1},
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], bias [V] and ids [N], the logits of order 4."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = (normal(N, D), normal(V, D), normal(V))
    ids = torch.randint(V, (N,), generator=generator)
    return *(x.requires_grad_() for x in leaves), ids  # type: ignore[return-value]


def whole(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, form: LogitForm) -> Tensor:
    """[N] logprobs at temperature 0.7, by the formulas as they are written."""
    logits = form.factor * (hidden @ weight.T + bias)
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return torch.log_softmax(logits / 0.7, -1)[torch.arange(N), ids]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 8, 1000])
def test_values_and_gradients_are_those_of_a_softmax_over_all_logits(form: LogitForm, chunk: int):
    *leaves, ids = inputs()
    *exact, _ = inputs(torch.float64)
    outer = torch.linspace(-1, 2, N)
    hidden, weight, bias = leaves
    found = chunked_logprobs(
        hidden, weight, ids, bias=bias, form=form, temperature=0.7, chunk=chunk
    )[:, 0]
    expected = whole(*exact, ids, form)  # type: ignore[call-arg]
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    (found * outer).sum().backward()
    (expected * outer).sum().backward()
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and other.grad is not None
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def test_the_entropy_is_the_softmaxs_and_pushes_nothing():
    hidden, weight, _, ids = inputs()
    found = chunked_logprobs(hidden, weight, ids, chunk=5, temperature=2.0, entropy=True)[:, 1]
    expected = f.entropy(hidden @ weight.T, temperature=2.0)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), hidden)[0].abs().max() == 0


def test_bf16_is_as_close_as_the_softmax_of_bf16_logits():
    hidden, weight, _, ids = inputs(torch.bfloat16)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, -1)[torch.arange(N), ids]
    theirs = f.token_logprobs((hidden @ weight.T)[None], ids[None])[0]
    ours = chunked_logprobs(hidden, weight, ids, chunk=8)[:, 0]
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()
    ours.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_no_more_logits_than_a_chunks_ever_exist():
    hidden, weight, ids = torch.randn(200, 4), torch.randn(50, 4), torch.arange(200) % 50
    hidden.requires_grad_()
    weight.requires_grad_()
    with Largest() as ours:
        chunked_logprobs(hidden, weight, ids, chunk=20, entropy=True)[:, 0].sum().backward()
    assert ours.elements == 20 * 50
    with Largest() as theirs:
        f.token_logprobs((hidden @ weight.T)[None], ids[None]).sum().backward()
    assert theirs.elements == 200 * 50


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_gives_the_logprobs_and_gradients_of_its_logits(
    kind: str, tokenizer: Any
):
    model = tiny_model(kind, tokenizer, **ARCHITECTURES[kind]).eval()
    ids = torch.randint(len(tokenizer), (3, 9), generator=torch.Generator().manual_seed(2))
    places = torch.tensor([1, 2, 8, 9 + 4, 18 + 8])
    logits = model(input_ids=ids).logits
    expected = torch.log_softmax(logits.float().flatten(0, 1)[places - 1], -1)
    expected = expected.gather(1, ids.flatten()[places].unsqueeze(1)).squeeze(1)
    expected.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    found, entropy = chosen_logprobs(model, ids, places, chunk=2, entropy=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, f.entropy(logits).flatten()[places - 1])
    found.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits, logits), "the model is as it was"


def test_what_follows_the_head_is_found_by_trying(tokenizer: Any):
    cpu = torch.device("cpu")
    assert logit_form(tiny_model("llama", tokenizer), cpu) == LogitForm()
    capped = tiny_model(
        "gemma2", tokenizer, final_logit_softcapping=30.0, head_dim=16, num_key_value_heads=1
    )
    assert logit_form(capped, cpu) == LogitForm(1.0, 30.0)


def test_logits_that_are_changed_in_another_way_are_refused(tokenizer: Any):
    model = tiny_model("llama", tokenizer)
    plain = type(model).forward

    def shifted(**inputs: Any) -> Any:
        made = plain(model, **inputs)
        made.logits = made.logits + 1
        return made

    model.forward = shifted
    with pytest.raises(ValueError, match="neither a factor nor a soft cap"):
        chosen_logprobs(model, torch.zeros(1, 2).long(), torch.tensor([1]), chunk=2)


def test_a_pass_that_fails_leaves_the_model_as_it_was(tokenizer: Any):
    model = tiny_model("llama", tokenizer)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    logits = model(input_ids=ids).logits
    with pytest.raises(IndexError):
        chosen_logprobs(model, ids, torch.tensor([9]), chunk=2)
    with pytest.raises(TypeError):
        chosen_logprobs(model, ids, torch.tensor([1]), chunk="2")  # type: ignore[arg-type]
    assert torch.equal(model(input_ids=ids).logits, logits)
    assert not model.lm_head._forward_hooks and "forward" not in vars(model.lm_head)


def test_a_frozen_head_passes_gradients_on_to_adapters_alone(tokenizer: Any):
    model = tiny_model("llama", tokenizer)
    add_lora(model, LoRAConfig(rank=2))
    logprobs, _ = chosen_logprobs(model, torch.arange(6)[None], torch.tensor([2, 5]), chunk=1)
    logprobs.sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("stage", [2, 3])
def test_tied_embeddings_train_under_zero(stage: int, tokenizer: Any):
    """GPT-2 reads one matrix at both ends: its gradient has two parts, in two modules."""
    ids, places = torch.arange(12).reshape(2, 6), torch.tensor([2, 3, 8, 11])
    plain = tiny_model("gpt2", tokenizer, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    logprobs = plain(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)[places - 1]
    logprobs = logprobs[torch.arange(4), ids.flatten()[places]]
    (-logprobs.sum()).backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters()]).norm()

    engine = TrainingEngine(
        tiny_model("gpt2", tokenizer, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        EngineConfig(zero_stage=stage),
        OptimizerConfig(),
        total_steps=1,
    )
    found, _ = chosen_logprobs(engine, ids.to(engine.device), places.to(engine.device), chunk=3)
    torch.testing.assert_close(found.cpu(), logprobs, rtol=1e-5, atol=1e-5)
    engine.backward(-found.sum())
    assert engine.step().grad_norm == pytest.approx(float(norm), rel=1e-4)
