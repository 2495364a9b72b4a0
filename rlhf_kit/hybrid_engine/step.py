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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_kit.config import GenerationConfig
from rlhf_kit.hybrid_engine.attention import STEP_NAME, attach, own_attention
from rlhf_kit.hybrid_engine.kv_cache import KVCache
from rlhf_kit.hybrid_engine.slots import LENGTH, TOKEN, Slots

BUCKETS = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Numbers of rows that graphs are captured for; fewer rows run in the next larger one."""
VARIANTS = 64
"""Compiled versions of a layer's code that may exist side by side: kinds of layer x models."""


class Step:
    """The step over one cache and one set of slots; on a GPU captured by number of rows."""

    def __init__(self, model: Any, cache: KVCache, slots: Slots, *, captured: bool) -> None:
        self.model = model
        self.cache = cache
        self.slots = slots
        self.captured = captured
        self.compiled = captured
        self.capture_seconds = 0.0
        self._graphs: dict[tuple[int, GenerationConfig], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None
        self._addresses: tuple[int, ...] = ()

    def rows(self, n: int) -> int:
        """Rows that are computed for n of them."""
        if not self.captured:
            return n
        return min(next((b for b in BUCKETS if b >= n), n), self.cache.slots)

    def check_addresses(self) -> None:
        """Drop the graphs where a parameter has moved since they were made."""
        now = tuple(p.data_ptr() for p in self.model.parameters())
        if now != self._addresses:
            self._graphs.clear()
            self._addresses = now

    def __call__(self, n: int, config: GenerationConfig) -> None:
        """Decode and sample one token of each of the first n slots, `rows(n)` of them in fact."""
        if not self.captured:
            self._run(n, config)
            return
        n = self.rows(n)
        key = (n, config)
        if key not in self._graphs:
            begin = time.perf_counter()
            self._graphs[key] = self._capture(n, config)
            self.capture_seconds += time.perf_counter() - begin
        self._graphs[key].replay()

    def _run(self, n: int, config: GenerationConfig) -> None:
        self.slots.sample(self._logits(n), self.slots.order[:n], config)

    def _logits(self, n: int) -> Tensor:
        """[N, V] logits of the tokens that follow; their keys and values are in the cache after."""
        token, length = self.slots.state[TOKEN, :n], self.slots.state[LENGTH, :n]
        return self.model(
            input_ids=token[None], position_ids=length[None], use_cache=False, plan=length
        ).logits[0]

    def _capture(self, n: int, config: GenerationConfig) -> torch.cuda.CUDAGraph:
        """Run the model once, to compile and to warm up, and record the step.

        Until slots advance, running it twice is running it once: a token is stored where it
        stood. So the first run may take the live slots.
        """
        with ExitStack() as stack:
            stack.enter_context(own_attention(self.model, STEP_NAME))
            stack.enter_context(attach(self.model, self.cache))
            if self.compiled:
                stack.enter_context(compiled_layers(self.model))
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._warm_up(n, config)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._run(n, config)
            self._pool = graph.pool()
        return graph

    def _warm_up(self, n: int, config: GenerationConfig) -> None:
        state = self.slots.state.clone()
        produced, ended = self.slots.produced.clone(), self.slots.ended.clone()
        self._run(n, config)
        self.slots.state.copy_(state)
        self.slots.produced.copy_(produced)
        self.slots.ended.copy_(ended)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's list of equal layers, each with an attention of its own; [] if there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            attentions = [[m for m in x.modules() if hasattr(m, "layer_idx")] for x in module]
            if all(attentions):
                return list(module)
    return []


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the model's layers run compiled, with the number of tokens left open."""
    layers = decoder_layers(model)
    with torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=1024):
        for layer in layers:
            layer.forward = _open_length(layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward


def _open_length(layer: nn.Module) -> Callable[..., Any]:
    compiled = _compiled(type(layer), [name for name, _ in layer.named_modules()])

    def forward(*args: Any, **kwargs: Any) -> Any:
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # [1, N, ...] or [N]; marked, or the second number of rows would compile again.
                torch._dynamo.maybe_mark_dynamic(tensor, min(1, tensor.dim() - 1))
        return compiled(layer, *args, **kwargs)

    return forward


def _layer_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


BACKEND = "inductor"


def _compiled(kind: type[nn.Module], names: list[str]) -> Callable[..., Any]:
    if kind not in _compiled_forwards:

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            join_linears(graph, names)
            return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

        _compiled_forwards[kind] = torch.compile(_layer_forward, backend=backend, fullgraph=True)
    return _compiled_forwards[kind]


_compiled_forwards: dict[type[nn.Module], Callable[..., Any]] = {}


def join_linears(graph: torch.fx.GraphModule, names: Sequence[str]) -> None:
    """Make linear layers that read the same input, as queries, keys and values, one operator.

    Weights are handed over in the order of the modules' `names`, which is that of memory.
    """
    groups: dict[Any, list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is F.linear and not node.kwargs:
            if all(x is None or x.op == "placeholder" for x in node.args[1:]):
                groups.setdefault(node.args[0], []).append(node)
    for source, nodes in groups.items():
        if len(nodes) < 2:
            continue
        first = nodes[0]
        nodes = sorted(nodes, key=lambda node: _place(node, names))
        weights = [node.args[1] for node in nodes]
        biases = [node.args[2] if len(node.args) > 2 else None for node in nodes]
        with graph.graph.inserting_before(first):
            operator = torch.ops.rlhf_kit.linears.default
            joined = graph.graph.call_function(operator, (source, weights, biases))
            sizes = [weight.meta["example_value"].shape[0] for weight in weights]
            begin = 0
            for node, size in zip(nodes, sizes, strict=True):
                part = graph.graph.call_function(torch.narrow, (joined, -1, begin, size))
                node.replace_all_uses_with(part)
                begin += size
        for node in nodes:
            graph.graph.erase_node(node)
    graph.recompile()


def _place(node: torch.fx.Node, names: Sequence[str]) -> int:
    """Where the module that a node comes from stands among `names`; 0 if it is unknown."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path, _ = list(stack.values())[-1]
    return max((i for i, name in enumerate(names) if name and path.endswith(name)), default=0)


@torch.library.custom_op("rlhf_kit::linears", mutates_args=())
def linears(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> Tensor:
    """`F.linear` of one input [..., H] with several weights [O_i, H]: [..., sum of O_i].

    One product where the weights adjoin. ZeRO keeps the matrices of a model one behind the
    other, so those of an attention's queries, keys and values are one matrix already.
    """
    sizes = [len(weight) for weight in weights]
    rows = input.flatten(0, -2)
    out = input.new_empty(rows.shape[0], sum(sizes))
    whole = _adjoining(weights)
    present = [bias for bias in biases if bias is not None]
    if whole is not None and len(present) in (0, len(biases)):
        bias = _adjoining(present) if present else None
        _linear(rows, whole, torch.cat(present) if present and bias is None else bias, out)
    else:
        for weight, bias, part in zip(weights, biases, out.split(sizes, dim=1), strict=True):
            _linear(rows, weight, bias, part)
    return out.unflatten(0, input.shape[:-1])


@linears.register_fake
def _(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return input.new_empty(*input.shape[:-1], sum(len(weight) for weight in weights))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(input, weight.T, out=out)
    else:
        torch.addmm(bias, input, weight.T, out=out)


def _adjoining(parts: Sequence[Tensor]) -> Tensor | None:
    """The tensor whose rows those of `parts` are, where they stand one behind the other."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.data_ptr() == end):
            return None
        end += part.nbytes
    shape = (sum(len(part) for part in parts), *first.shape[1:])
    return first.as_strided(shape, first.stride())
