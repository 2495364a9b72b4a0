"""Counts how often a module's weights have changed, for what is derived from them.

An optimiser's step count would not do: a resumed run loads other weights at the same step, and
the average of the weights takes their place for a while.
"""

from __future__ import annotations

from torch import nn

from rlhf_kit.shared_base import Role

_NAME = "_weights_version"


def weights_version(module: nn.Module) -> int:
    """A number that is another one after every change."""
    return getattr(_whole(module), _NAME, 0)


def weights_changed(module: nn.Module) -> None:
    """To be called after every change of the weights in place."""
    setattr(_whole(module), _NAME, weights_version(module) + 1)


def _whole(module: nn.Module) -> nn.Module:
    """What generates with a role's weights is the whole model, not what the role holds."""
    return module.whole if isinstance(module, Role) else module
