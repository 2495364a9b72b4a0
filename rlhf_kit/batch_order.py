"""The order rows are seen in: permutations, batches of similar length, and names for both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from random import Random

from rlhf_kit.distributed import derive_seed


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of range(n), another one for each epoch."""
    order = list(range(n))
    Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return order


def length_bucketed_batches(
    lengths: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    drop_last: bool = False,
    mega_batch: int = 16,
) -> list[list[int]]:
    """Batches of rows of similar length, each row once; they depend on no number of ranks.

    Shuffle the rows, cut them into mega-batches, sort each by length, cut those into batches,
    and shuffle the batches. The rows that fill no batch are the last of the shuffled order, not
    the longest; they come as a smaller batch at the end, or not at all with `drop_last`.

    Args:
        lengths: tokens of each row.
        batch_size: rows a batch, over all ranks.
        mega_batch: batches sorted together; 1 sorts nothing across batches.
    """
    order = epoch_order(len(lengths), seed=seed, epoch=epoch)
    full = len(order) - len(order) % batch_size
    rest = order[full:]
    batches: list[list[int]] = []
    for start in range(0, full, batch_size * mega_batch):
        mega = order[start : min(start + batch_size * mega_batch, full)]
        mega.sort(key=lambda row: lengths[row])
        batches += [mega[i : i + batch_size] for i in range(0, len(mega), batch_size)]
    Random(derive_seed(seed, "batches", epoch)).shuffle(batches)
    return batches if drop_last or not rest else [*batches, rest]


def fingerprint(ids: Iterable[str | int]) -> str:
    """Eight hex digits that name a sequence of ids: equal in two logs, equal data."""
    digest = hashlib.blake2b(digest_size=4)
    for i, each in enumerate(ids):
        digest.update(f"\n{each}".encode() if i else str(each).encode())
    return digest.hexdigest()
