"""A model's layers, compiled for decoding: few kernels stand between two matrix products.

Shapes: N rows being decoded.

torch.compile fuses what is pointwise. Four rewrites of the traced layer come before it, of what
it leaves apart: linear layers of one input become one product, a ReLU goes into the product
before it, a product adds itself to the residual stream, and a factor on the queries goes into the
attention.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlhf_kit.hybrid_engine import linears as _operators  # noqa: F401  (registers them)

BACKEND = "inductor"
LINEAR: Any = torch._C._nn.linear  # type: ignore[attr-defined]
"""torch's own: under ZeRO-3 DeepSpeed puts a function for its backward in `F.linear`'s place."""
VARIANTS = 64
"""Compiled versions of a layer's code that may exist side by side: kinds of layer x models."""


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
        before = [vars(layer).get("forward") for layer in layers]
        linear, F.linear = F.linear, LINEAR
        embedding, F.embedding = F.embedding, _rows_of
        for layer in layers:
            vars(layer)["forward"] = _open_length(layer)
        try:
            yield
        finally:
            F.linear, F.embedding = linear, embedding
            for layer, forward in zip(layers, before, strict=True):
                del vars(layer)["forward"]
                if forward is not None:
                    vars(layer)["forward"] = forward


def _rows_of(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.embedding`; its own kernel for up to 16 rows takes five times as long on a GPU."""
    return weight[input]


def _open_length(layer: nn.Module) -> Callable[..., Any]:
    compiled = _compiled(type(layer), [name for name, _ in layer.named_modules()])

    def forward(*args: Any, **kwargs: Any) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # [1, N, ...], [N] or [K, P]; marked, or the second number would compile again.
                for dim in range(min(2, tensor.dim())):
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(layer, *args, **kwargs)

    return forward


def _layer_forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)


def _compiled(kind: type[nn.Module], names: list[str]) -> Callable[..., Any]:
    if kind not in _compiled_forwards:

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            fold_scale(graph)
            fuse_relu(graph)
            fuse_sum(graph)
            join_linears(graph, names)
            return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

        _compiled_forwards[kind] = torch.compile(_layer_forward, backend=backend, fullgraph=True)
    return _compiled_forwards[kind]


_compiled_forwards: dict[type[nn.Module], Callable[..., Any]] = {}


def join_linears(graph: torch.fx.GraphModule, names: Sequence[str]) -> None:
    """Make linear layers operators of ours: one of all that read the same input, as queries,
    keys and values do.

    Weights are handed over in the order of the modules' `names`, which is that of memory.
    """
    groups: dict[Any, list[torch.fx.Node]] = {}
    for node in graph.graph.nodes:
        is_linear = node.op == "call_function" and node.target is LINEAR and not node.kwargs
        if is_linear and all(x is None or x.op == "placeholder" for x in node.args[1:]):
            groups.setdefault(node.args[0], []).append(node)
    for nodes in groups.values():
        first = nodes[0]
        source = first.args[0]  # which may have been replaced meanwhile
        nodes = sorted(nodes, key=lambda node: _place(node, names))
        weights = [node.args[1] for node in nodes]
        biases = [node.args[2] if len(node.args) > 2 else None for node in nodes]
        with graph.graph.inserting_before(first):
            joined = graph.graph.call_function(
                torch.ops.rlhf_kit.linears.default, (source, weights, biases)
            )
            begin = 0
            for node, weight in zip(nodes, weights, strict=True):
                part, size = joined, _example(weight).shape[0]
                if len(nodes) > 1:
                    part = graph.graph.call_function(torch.narrow, (joined, -1, begin, size))
                node.replace_all_uses_with(part)
                begin += size
        for node in nodes:
            graph.graph.erase_node(node)
    graph.recompile()


def fuse_relu(graph: torch.fx.GraphModule) -> None:
    """Let the product before a ReLU apply it on its way out."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not F.relu:
            continue
        linear = node.args[0]
        if linear.target is not LINEAR or len(linear.users) > 1:
            continue
        if (*linear.args, None)[2] is None:
            continue
        with graph.graph.inserting_before(node):
            fused = graph.graph.call_function(torch.ops.rlhf_kit.linear_relu.default, linear.args)
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
        graph.graph.erase_node(linear)
    graph.recompile()


def fuse_sum(graph: torch.fx.GraphModule) -> None:
    """Let a product that is added to what the layer has made so far add itself.

    Its bias goes there first: whichever kernel makes that sum adds it on its way.
    """
    _drop_dropout(graph)
    for node in graph.graph.nodes:
        if node.target is not operator.add or node.kwargs:
            continue
        linear, others = node.args[1], node.args[0]
        if getattr(linear, "target", None) is not LINEAR:
            linear, others = others, linear
        # A layer's input is another's output; what is made here may be written over.
        if not _adds_itself(linear, node) or others.op == "placeholder":
            continue
        source, weight, bias = (*linear.args, None)[:3]
        with graph.graph.inserting_before(node):
            call = graph.graph.call_function
            with_bias = (torch.clone, (others,)) if bias is None else (operator.add, (others, bias))
            sums = call(*with_bias)
            call(torch.ops.rlhf_kit.add_linear.default, (sums, source, weight))
        node.replace_all_uses_with(sums)
        graph.graph.erase_node(node)
        graph.graph.erase_node(linear)
    graph.recompile()


def _drop_dropout(graph: torch.fx.GraphModule) -> None:
    """Take out what is off and would hide a product from its sum."""
    for node in graph.graph.nodes:
        if node.target is F.dropout and node.kwargs.get("training") is False:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _adds_itself(linear: Any, node: torch.fx.Node) -> bool:
    """Whether a value is a product that nothing reads but the sum `node`, of two of its kind."""
    if getattr(linear, "target", None) is not LINEAR or len(linear.users) > 1 or linear.kwargs:
        return False
    whole, terms = _example(node), [_example(x) for x in node.args if isinstance(x, torch.fx.Node)]
    same = all(x.shape == whole.shape and x.dtype == whole.dtype for x in terms)
    return len(terms) == 2 and same


def fold_scale(graph: torch.fx.GraphModule) -> None:
    """Let attention multiply by what OPT multiplies its queries by."""
    for node in graph.graph.nodes:
        if node.target is not torch.ops.rlhf_kit.attend_step.default:
            continue
        query = node.args[0]
        while query.target in ("view", "transpose", operator.getitem) and len(query.users) == 1:
            query = query.args[0]
        number = query.args[1] if query.target is operator.mul else None
        if isinstance(number, float) and len(query.users) == 1:
            query.replace_all_uses_with(query.args[0])
            node.update_arg(7, node.args[7] * number)
            graph.graph.erase_node(query)
    graph.recompile()


def _example(node: Any) -> Tensor:
    """A tensor of the shape that a traced value has."""
    return node.meta["example_value"]


def _place(node: torch.fx.Node, names: Sequence[str]) -> int:
    """Where the module that a node comes from stands among `names`; 0 if it is unknown."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    path, _ = list(stack.values())[-1]
    return max((i for i, name in enumerate(names) if name and path.endswith(name)), default=0)
