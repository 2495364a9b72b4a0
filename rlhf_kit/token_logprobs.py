"""Logprobs of chosen tokens without the logits of a whole batch, in the forward or the backward.

Shapes: B batch, T sequence tokens, N chosen tokens, D hidden size, V vocabulary, C tokens a chunk.

A vocabulary of 50,000 makes the logits of a batch larger than everything else in it: 16,384 tokens
take 3.3 GB in fp32, and softmax and its gradient take that again. Here no more than C x V of them
exist at a time, and the backward pass computes each chunk's once more.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_kit.config import require


@dataclass(frozen=True)
class LogitForm:
    """What becomes of x, the head's output: softcap * tanh(factor * x / softcap).

    Without a soft cap it is factor * x. The temperature, which the sampler divides by, is in
    neither.
    """

    factor: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        if self.factor != 1:
            x = x * self.factor
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor | float:
        """The derivative at the x that gave `logits`."""
        if self.softcap is None:
            return self.factor
        return self.factor * (1 - (logits / self.softcap).square())


class _ChunkedLogprobs(torch.autograd.Function):
    """[N, 2] fp32: the logprob of each token, and the entropy, which has no gradient.

    On a GPU by kernels of our own (`logprob_kernels`), which make copies of no logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        form: LogitForm,
        temperature: float,
        chunk: int,
        entropy: bool,
    ) -> Tensor:
        result = hidden.new_zeros(len(ids), 2, dtype=torch.float32)
        normalizers = hidden.new_empty(len(ids), dtype=torch.float32)
        ctx.settings = {"factor": form.factor, "softcap": form.softcap, "temperature": temperature}
        for start in range(0, len(ids), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(hidden[part], weight, bias)
            if hidden.is_cuda:
                from rlhf_kit import logprob_kernels

                found = result[part], normalizers[part]
                logprob_kernels.logprobs(logits, ids[part], *found, **ctx.settings)
                continue
            logits = form(logits) / temperature
            normalizer = torch.logsumexp(logits, -1)
            chosen = logits.gather(-1, ids[part].unsqueeze(-1)).squeeze(-1)
            result[part, 0] = chosen - normalizer
            normalizers[part] = normalizer
            if entropy:
                probabilities = (logits - normalizer.unsqueeze(-1)).exp_()
                result[part, 1] = normalizer - probabilities.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, ids, normalizers)
        ctx.form, ctx.temperature, ctx.chunk = form, temperature, chunk
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, bias, ids, normalizers = ctx.saved_tensors
        outer = gradients[0][:, 0]
        wanted = ctx.needs_input_grad
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        weight_grad = torch.zeros_like(weight) if wanted[1] else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        for start in range(0, len(ids), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = F.linear(hidden[part], weight, bias)
            if hidden.is_cuda:
                from rlhf_kit import logprob_kernels

                made = ids[part], normalizers[part], outer[part]
                grad = logprob_kernels.gradient(logits, *made, **ctx.settings)
            else:
                logits = ctx.form(logits)
                slope = ctx.form.slope(logits)
                # d logprob / d logits = onehot - softmax
                grad = (logits / ctx.temperature - normalizers[part].unsqueeze(-1)).exp_().neg_()
                grad.scatter_add_(-1, ids[part].unsqueeze(-1), torch.ones_like(grad[:, :1]))
                grad = grad.mul_((outer[part] / ctx.temperature).unsqueeze(-1)).mul_(slope)
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=torch.float32)
            grad = grad.to(weight.dtype)
            if hidden_grad is not None:
                torch.mm(grad, weight, out=hidden_grad[part])
            if weight_grad is not None:
                weight_grad.addmm_(grad.T, hidden[part])
        if bias_grad is not None:
            bias_grad = bias_grad.to(bias.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None, None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    chunk: int,
    bias: Tensor | None = None,
    form: LogitForm | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Tensor:
    """[N, 2] fp32: logprob of `ids` [N] and entropy, from hidden states [N, D] and a head [V, D].

    The entropy (in nats) has no gradient, and is 0 unless asked for. Equal to
    `functional.token_logprobs` and `functional.entropy` of the logits up to the rounding of a
    matrix product of another size.
    """
    made = _ChunkedLogprobs.apply(
        hidden, weight, bias, ids, form or LogitForm(), temperature, chunk, entropy
    )
    return cast(Tensor, made)


def output_head(model: Any) -> nn.Linear:
    """The linear layer from hidden states to logits of a transformers causal LM."""
    head = model.get_output_embeddings()
    require(
        isinstance(head, nn.Linear),
        f"{type(model).__name__} has no linear layer before its logits, which logprobs are "
        "computed from; use another architecture",
    )
    return head


@contextlib.contextmanager
def _forward_is(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module` computes `forward`; its hooks, ZeRO-3's among them, stay in place."""
    fields = vars(module)
    before = fields.get("forward")
    fields["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del fields["forward"]
        else:
            fields["forward"] = before


FORMS: WeakKeyDictionary[nn.Module, LogitForm] = WeakKeyDictionary()
"""What was found for each model, once."""


def logit_form(model: Any, device: torch.device) -> LogitForm:
    """What a causal LM (or an engine around one) does to its head's output, found by trying.

    Soft caps (Gemma) and factors (Granite, Cohere) come after the head, under a name and in a
    place of each architecture's own. ValueError where it is something else.
    """
    module = getattr(model, "module", model)
    if module in FORMS:
        return FORMS[module]
    head = output_head(module)
    tried = torch.zeros(head.out_features, device=device)
    tried[:4] = torch.tensor([1.0, 2.0, -3.0, 1e6])
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad(), _forward_is(head, lambda hidden: tried.expand(*hidden.shape[:-1], -1)):
        found = model(input_ids=ids, use_cache=False).logits.flatten().float()
    one, two, _, million = found[:4].tolist()
    form = _form_of(one, two, million)
    require(
        found.shape == tried.shape and torch.allclose(found, form(tried), rtol=1e-5, atol=0),
        f"{type(module).__name__} changes its logits after the output layer in a way that is "
        "neither a factor nor a soft cap; use another architecture",
    )
    FORMS[module] = form
    return form


def _form_of(one: float, two: float, million: float) -> LogitForm:
    """The form that maps 1, 2 and 1e6 to these, if any does."""
    if abs(two - 2 * one) <= 1e-6 * abs(one):
        return LogitForm(one)
    factor = math.atanh(max(min(one / million, 0.99), -0.99)) * million
    return LogitForm(1.0 if abs(factor - 1) < 1e-5 else factor, million)


def chosen_logprobs(
    model: Callable[..., Any],
    input_ids: Tensor,
    places: Tensor,
    *,
    chunk: int,
    temperature: float = 1.0,
    entropy: bool = False,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Logprobs [N] of the tokens at flat `places` [N] of [B, T] ids, and entropies [N].

    No place is a row's first: each token is predicted from the one before it. `model` is a
    transformers causal LM or an engine around one, `inputs` are what else its forward takes.
    Entropies (without a gradient) are 0 unless asked for.

    The head computes logprobs in place of logits, inside the model's own forward: so no
    architecture needs code of its own, and ZeRO-3 gathers the head's weight as ever.
    """
    form = logit_form(model, input_ids.device)
    module: Any = getattr(model, "module", model)
    head = output_head(module)
    ids = input_ids.flatten().index_select(0, places)
    found: list[Tensor] = []

    def logprobs(hidden: Tensor) -> Tensor:
        return chunked_logprobs(
            hidden.flatten(0, 1).index_select(0, places - 1),
            head.weight,
            ids,
            chunk=chunk,
            bias=head.bias,
            form=form,
            temperature=temperature,
            entropy=entropy,
        )

    whole = module.forward

    def forward(**everything: Any) -> Tensor:
        whole(**everything)  # what comes after the head is done to logprobs there, and dropped
        return found.pop()

    # Registered last, so it sees the output as ZeRO-3's hooks leave it.
    watch = head.register_forward_hook(lambda *call: found.append(call[-1]))
    try:
        with _forward_is(head, logprobs), _forward_is(module, forward):
            made = model(input_ids=input_ids, use_cache=False, **inputs)
    finally:
        watch.remove()
    logprob, entropies = made.unbind(-1)
    return logprob, entropies.detach()
