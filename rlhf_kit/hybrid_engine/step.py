"""One decode step of the first N slots: the live model, a sampled token a row, and on.

Shapes: N rows, H hidden, V vocabulary.

Three ways to run it, the same arithmetic up to rounding:
- `eager`: every operation on its own, through the model's own Python;
- compiled layers: what stands between two matrix products becomes one kernel. One layer is
  compiled, not the model, because layers that differ only in their weights share the code;
- captured: the whole step is a CUDA graph, which the host starts with one call.

The model's own forward does the work in all three, over the parameters as they are: a graph
stays valid when an optimiser writes new values into them, and is made anew where they moved.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from rlhf_kit.chat_template import first_line
from rlhf_kit.config import GenerationConfig
from rlhf_kit.distributed import print_main
from rlhf_kit.hybrid_engine.attention import (
    PROMPT_NAME,
    STEP_NAME,
    PackedPrompts,
    PromptPlan,
    attach,
    own_attention,
)
from rlhf_kit.hybrid_engine.compiled_layers import compiled_layers
from rlhf_kit.hybrid_engine.kv_cache import KVCache
from rlhf_kit.hybrid_engine.slots import BLOCK, LENGTH, TOKEN, Slots

BUCKETS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows that graphs are captured for, and multiples of the last; other numbers run in
the next larger one."""


class Captures:
    """What the captured steps of one decoder leave to those that come after, with another cache."""

    def __init__(self) -> None:
        self.warm = set[Any]()
        """Kinds of step that ran: they are compiled, and will be needed again."""
        self._keeper: torch.cuda.CUDAGraph | None = None

    def pool(self, device: torch.device) -> Any:
        """Memory for graphs, which the next ones find again.

        A pool ends with the last graph in it, and its memory would be nobody's until all caches
        are emptied. So one graph, of next to nothing, stays in it.
        """
        if self._keeper is None:
            self._keeper = _graph_of(lambda: torch.zeros(1, device=device), device)
        return self._keeper.pool()


class Step:
    """The step over one cache and one set of slots; on a GPU captured by number of rows."""

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        slots: Slots,
        *,
        captured: bool,
        captures: Captures,
    ) -> None:
        self.model = model
        self.cache = cache
        self.slots = slots
        self.captured = captured
        self.compiled = captured
        self.capture_seconds = 0.0
        self._graphs: dict[tuple[int, GenerationConfig], torch.cuda.CUDAGraph] = {}
        self._captures = captures
        self._addresses = _addresses(model)

    def rows(self, n: int) -> int:
        """Rows that are computed for n of them."""
        if not self.captured:
            return n
        most = BUCKETS[-1]
        rounded = next((b for b in BUCKETS if b >= n), -(-n // most) * most)
        return min(rounded, self.cache.slots)

    def check_addresses(self) -> None:
        """Drop the graphs where a parameter has moved since they were made."""
        now = _addresses(self.model)
        if now != self._addresses:
            self._graphs.clear()
            self._addresses = now

    def __call__(self, n: int, config: GenerationConfig) -> None:
        """Decode and sample one token of each of the first n slots, `rows(n)` of them in fact."""
        if not self.captured:
            self._run(n, config)
            return
        n = self.rows(n)
        if (n, config) not in self._graphs:
            begin = time.perf_counter()
            for rows in self._captured_with(n, config):
                self._graphs[rows, config] = self._capture(rows, config)
            self.capture_seconds += time.perf_counter() - begin
        self._graphs[n, config].replay()

    def _run(self, n: int, config: GenerationConfig) -> None:
        self.slots.sample(self._logits(n), self.slots.order[:n], config)

    def _logits(self, n: int) -> Tensor:
        """[N, V] logits of the tokens that follow; keys and values go into the cache."""
        token, length, block = (self.slots.state[i, :n] for i in (TOKEN, LENGTH, BLOCK))
        return forward(self.model, token, length, (length, block))

    def read(self, tokens: Tensor, positions: Tensor, plan: PromptPlan, keep: Tensor) -> Tensor:
        """Prompts, packed [M], into their slots by compiled layers; logits [K, V] of `keep` [K].

        The cache must have been written to before.
        """
        packed = PackedPrompts(plan.blocks, plan.pad, plan.unpad)
        while True:
            with ExitStack() as stack:
                stack.enter_context(own_attention(self.model, PROMPT_NAME))
                stack.enter_context(attach(self.model, self.cache))
                if self.compiled:
                    stack.enter_context(compiled_layers(self.model))
                try:
                    return forward(self.model, tokens, positions, packed, keep)
                except TorchDynamoException as error:
                    self._not_compiled(error)

    def _not_compiled(self, error: Exception) -> None:
        """From now on layers run as they are; says so."""
        print_main(
            f"the layers of {type(self.model).__name__} can't be compiled and run as they are: "
            f"{first_line(error)}"
        )
        self.compiled = False

    def _captured_with(self, n: int, config: GenerationConfig) -> list[int]:
        """n, and with the first graph all that an earlier cache like this one needed.

        The host captures them while the GPU reads prompts; one at a time, later, the GPU would
        wait for each.
        """
        if self._graphs:
            return [n]
        warm = self._captures.warm
        earlier = {kind[0] for kind in warm if kind == self._kind(kind[0], config)}
        return [n, *sorted(earlier - {n}, reverse=True)]

    def _capture(self, n: int, config: GenerationConfig) -> torch.cuda.CUDAGraph:
        """Run the model once, if it never ran so, to compile and to warm up; record the step.

        Until slots advance, running it twice is running it once: a token is stored where it
        stood. So the first run may take the live slots.
        """
        with ExitStack() as stack:
            stack.enter_context(own_attention(self.model, STEP_NAME))
            stack.enter_context(attach(self.model, self.cache))
            if self.compiled:
                stack.enter_context(compiled_layers(self.model))
            side = _side_stream(self.slots.state.device)
            if self._kind(n, config) not in self._captures.warm:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    try:
                        self._warm_up(n, config)
                    except TorchDynamoException as error:
                        self._not_compiled(error)
                        return self._capture(n, config)
                torch.cuda.current_stream().wait_stream(side)
                self._captures.warm.add(self._kind(n, config))
            try:
                return self._record(n, config)
            except torch.OutOfMemoryError:
                # Memory that lies cached, of prompts or of training, is out of a capture's reach.
                torch.cuda.empty_cache()
                return self._record(n, config)

    def _record(self, n: int, config: GenerationConfig) -> torch.cuda.CUDAGraph:
        device = self.slots.state.device
        return _graph_of(lambda: self._run(n, config), device, self._captures.pool(device))

    def _kind(self, n: int, config: GenerationConfig) -> tuple[Any, ...]:
        """All that what is compiled may depend on."""
        return n, config, self.compiled, self.cache.slots, self.cache.max_len

    def _warm_up(self, n: int, config: GenerationConfig) -> None:
        state = self.slots.state.clone()
        produced, ended = self.slots.produced.clone(), self.slots.ended.clone()
        self._run(n, config)
        self.slots.state.copy_(state)
        self.slots.produced.copy_(produced)
        self.slots.ended.copy_(ended)


def forward(
    model: Any, tokens: Tensor, positions: Tensor, plan: Any, keep: Tensor | None = None
) -> Tensor:
    """The live model over M packed tokens [M]; logits [M, V], or [N, V] of the tokens to keep."""
    options = {} if keep is None else {"logits_to_keep": keep}
    # Not through __call__: DeepSpeed's hooks there are about training, and wait for the GPU.
    logits = model.forward(
        input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=plan, **options
    ).logits[0]
    return logits if keep is None or len(logits) == len(keep) else logits[keep]


def _graph_of(run: Callable[[], Any], device: torch.device, *pool: Any) -> torch.cuda.CUDAGraph:
    """What `run` does, recorded; nothing waits for what the GPU is doing meanwhile.

    Not by `torch.cuda.graph`, which waits and empties all caches each time, pinned memory's too.
    Other threads, as NCCL's watchdog, may go on calling CUDA meanwhile.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side_stream(device)):
        graph.capture_begin(*pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    return graph


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace of tens of megabytes for every stream."""
    return torch.cuda.Stream(device)


def _addresses(model: nn.Module) -> tuple[int, ...]:
    return tuple(parameter.data_ptr() for parameter in model.parameters())
