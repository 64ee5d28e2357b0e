"""Gradient checkpointing from outside: the forward of a module instance is replaced, its class stays as it is.

Because `forward` is replaced and not `__call__`, hooks on the module fire once per forward; the recomputation in the
backward does not fire them again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_MARK = "checkpointed_forward"


def checkpointed(module: nn.Module, *, offload: bool = False, in_eval: bool = False) -> nn.Module:
    """Recompute the module in the backward instead of keeping its activations.

    Random draws inside the module are repeated exactly. Nothing changes while gradients are off.

    Args:
        module: e.g. a transformer block; adapters inside it must be applied before.
        offload: keep the module's inputs in CPU memory until the backward; not for blocks that are compiled.
        in_eval: also when the module is not in training mode.

    Returns:
        The module.
    """
    if is_checkpointed(module):
        return module
    inner = module.forward
    had_own = "forward" in module.__dict__

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not (module.training or in_eval):
            return inner(*args, **kwargs)
        if not offload:
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        # The checkpoint saves its inputs before its own bookkeeping starts, so this reaches them and nothing else.
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)

    setattr(forward, _MARK, (inner, had_own))
    module.forward = forward
    return module


def uncheckpointed(module: nn.Module) -> nn.Module:
    """Undo `checkpointed`; nothing to do for other modules. What was put over it (compilation) is undone first."""
    current: Callable[..., Any] | None = module.__dict__.get("forward")
    mark = getattr(current, _MARK, None)
    if mark is None:
        return module
    inner, had_own = mark
    if had_own:
        module.forward = inner
    else:
        del module.forward
    return module


def is_checkpointed(module: nn.Module) -> bool:
    """Whether the outermost replacement of the module's forward is a checkpoint."""
    return hasattr(module.__dict__.get("forward"), _MARK)
