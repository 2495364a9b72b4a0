"""The pretraining text as one long row of token ids, written by several processes.

Shapes: N tokens.
"""

from __future__ import annotations

from multiprocessing import get_context
from random import Random

import numpy as np
from tokenizers import Tokenizer

from rlhf_kit.toy_world.pretraining import draw_text

TOKENS_A_SHARD = 1_000_000
TEXTS_A_BATCH = 2_000


def build_corpus(
    tokenizer_file: str, *, tokens: int, seed: int, processes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw text until there are `tokens` tokens.

    The result depends on the seed alone, not on the number of processes.

    Returns:
        ids: uint16 `[N]`.
        loss_mask: bool `[N]`, True where a token counts in the loss.
    """
    shards = -(-tokens // TOKENS_A_SHARD)
    jobs = [(tokenizer_file, f"{seed}/{number}") for number in range(shards)]
    if processes == 1:
        parts = [_build_shard(job) for job in jobs]
    else:
        with get_context("spawn").Pool(processes) as pool:
            parts = pool.map(_build_shard, jobs, chunksize=1)
    ids, loss_mask = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ids[:tokens], loss_mask[:tokens]


def _build_shard(job: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    tokenizer_file, seed = job
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = Random(f"corpus/{seed}")
    ids: list[int] = []
    loss_mask: list[bool] = []
    while len(ids) < TOKENS_A_SHARD:
        segments = [segment for _ in range(TEXTS_A_BATCH) for segment in draw_text(rng)]
        encodings = tokenizer.encode_batch_fast([text for text, _ in segments])
        for encoding, (_, counts) in zip(encodings, segments, strict=True):
            ids += encoding.ids
            loss_mask += [counts] * len(encoding.ids)
    return (
        np.array(ids[:TOKENS_A_SHARD], dtype=np.uint16),
        np.array(loss_mask[:TOKENS_A_SHARD], dtype=bool),
    )
