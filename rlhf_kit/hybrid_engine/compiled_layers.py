"""A model's layers, compiled for decoding: few kernels stand between two matrix products.

Shapes: N rows being decoded, H input size, O_i output size of a linear layer.

torch.compile fuses what is pointwise. Three rewrites of the traced layer come before it, of what
it leaves apart: linear layers of one input become one product, a ReLU goes into the product
before it, and a factor on the queries goes into the attention.
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
        for layer in layers:
            vars(layer)["forward"] = _open_length(layer)
        try:
            yield
        finally:
            F.linear = linear
            for layer, forward in zip(layers, before, strict=True):
                del vars(layer)["forward"]
                if forward is not None:
                    vars(layer)["forward"] = forward


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
        is_linear = node.op == "call_function" and node.target is LINEAR and not node.kwargs
        if is_linear and all(x is None or x.op == "placeholder" for x in node.args[1:]):
            groups.setdefault(node.args[0], []).append(node)
    for source, nodes in groups.items():
        if len(nodes) < 2:
            continue
        first = nodes[0]
        nodes = sorted(nodes, key=lambda node: _place(node, names))
        weights = [node.args[1] for node in nodes]
        biases = [node.args[2] if len(node.args) > 2 else None for node in nodes]
        with graph.graph.inserting_before(first):
            joined = graph.graph.call_function(
                torch.ops.rlhf_kit.linears.default, (source, weights, biases)
            )
            sizes = [_example(weight).shape[0] for weight in weights]
            begin = 0
            for node, size in zip(nodes, sizes, strict=True):
                part = graph.graph.call_function(torch.narrow, (joined, -1, begin, size))
                node.replace_all_uses_with(part)
                begin += size
        for node in nodes:
            graph.graph.erase_node(node)
    graph.recompile()


def fuse_relu(graph: torch.fx.GraphModule) -> None:
    """Let the product before a ReLU apply it, which cuBLAS does on the way out."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not F.relu:
            continue
        linear = node.args[0]
        if linear.target is not LINEAR or len(linear.users) > 1 or len(linear.args) < 3:
            continue
        source, weight, bias = linear.args
        if bias is None or _example(source).dim() != 2:
            continue
        with graph.graph.inserting_before(node):
            transposed = graph.graph.call_function(torch.t, (weight,))
            fused = graph.graph.call_function(
                torch.ops.aten._addmm_activation.default, (bias, source, transposed)
            )
        node.replace_all_uses_with(fused)
        graph.graph.erase_node(node)
        graph.graph.erase_node(linear)
    graph.recompile()


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


@torch.library.custom_op("rlhf_kit::linears", mutates_args=())
def linears(input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
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
