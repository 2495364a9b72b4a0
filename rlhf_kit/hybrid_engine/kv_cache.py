"""The keys and values of the rows being decoded, in preallocated blocks.

Shapes: S blocks, N rows being decoded, K a group of prompts, P prompt, Hkv key/value heads, D head
size (of keys and values, which may differ), C the most tokens a block holds.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer, keys and values [S, Hkv, C, D]; a layer is allocated when it first writes.

    A row that is decoded has one block. The cache does not know how long the row is: whoever
    writes says where, whoever reads masks what lies behind. Memory is zeroed, because what is
    masked still has to be a number.
    """

    def __init__(self, slots: int, max_len: int) -> None:
        self.slots = slots
        self.max_len = max_len
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write_prompts(self, layer: int, blocks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store whole prompts [K, Hkv, P, D] in `blocks` [K]."""
        for block, new in zip(self._layer(layer, keys, values), (keys, values), strict=True):
            if block.is_cuda:
                from rlhf_kit.hybrid_engine import kernels

                kernels.store(new, block, blocks)
            else:
                block[blocks, :, : new.shape[2]] = new

    def write_tokens(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store one token [N, Hkv, D] in each of the first N blocks, at positions `at` [N]."""
        rows = torch.arange(at.shape[0], device=at.device)
        for block, new in zip(self.layers[layer], (keys, values), strict=True):
            block[rows, :, at] = new

    def read(self, layer: int, rows: int, span: int) -> tuple[Tensor, Tensor]:
        """Views [rows, Hkv, span, D] of the first `rows` blocks."""
        keys, values = self.layers[layer]
        return keys[:rows, :, :span], values[:rows, :, :span]

    def move(self, source: Tensor, target: Tensor, span: int) -> None:
        """Copy the first `span` tokens of blocks `source` to blocks `target`, both 1-D int64."""
        for blocks in self.layers.values():
            for block in blocks:
                block[target, :, :span] = block[source, :, :span]

    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(block.nbytes for blocks in self.layers.values() for block in blocks)

    def _layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            self.layers[layer] = (self._block(keys), self._block(values))
        return self.layers[layer]

    def _block(self, like: Tensor) -> Tensor:
        return like.new_zeros(self.slots, like.shape[1], self.max_len, like.shape[3])
