"""What operations allocate, counted; and a stand-in for attention where tensors hold nothing.

Shapes: B rows, T sequence tokens, H heads, D head size.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAME = "rlhf_kit_watched"
"""Of the function that `attending` registers with transformers."""
BLOCK = 512
"""The CUDA allocator hands out multiples of this many bytes."""


class Watch(TorchDispatchMode):
    """Counts the bytes that operations inside it allocate: `live` now, `peak` at most.

    Storages of `known` tensors do not count, nor those of other devices. A tensor on the meta
    device that is asked for its value says `answer`.
    """

    def __init__(self, known: Iterable[Tensor] = (), *, device: str = "meta", answer: bool = False):
        super().__init__()
        self.device, self.answer = device, answer
        self.live = self.peak = 0
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return self.answer
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.device.type == self.device:
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def gone(_: Any) -> None:
            del self._seen[key]
            self.live -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.live += size


class Fused(torch.autograd.Function):
    """Keeps and takes what torch's fused attention does, without the arithmetic.

    Kept are queries, keys, values, the output, each row's log-sum-exp in fp32, and a mask as a
    bias in the queries' dtype; the backward adds up the queries' gradient in fp32
    (aten/src/ATen/native/transformers/cuda/attention.cu, attention_backward.cu). The output is
    laid out as the queries are, or with a mask as [B, T, H, D].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rows, heads, length, size = query.shape
        out, bias = torch.empty_like(query), None
        if mask is not None or value.shape[-1] != size:
            out = query.new_empty(rows, length, heads, value.shape[-1]).transpose(1, 2)
            bias = None if mask is None else mask.to(query.dtype)
        log_sum = query.new_empty(rows, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sum, bias)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        query, key, value, _, log_sum, _ = ctx.saved_tensors
        held = torch.empty_like(log_sum), torch.empty_like(query, dtype=torch.float32)
        result = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        del held
        return *result, None


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` is the stand-in, in the backward pass too.

    A mode of torch's would not reach what checkpoints compute again there.
    """
    plain = F.scaled_dot_product_attention

    def stand_in(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        return Fused.apply(query, key, value, attn_mask)

    F.scaled_dot_product_attention = stand_in
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@contextlib.contextmanager
def attending(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module attends through `function`, for which transformers makes no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, function)
    before = module.config._attn_implementation
    module.set_attn_implementation(NAME)
    yield
    module.set_attn_implementation(before)
