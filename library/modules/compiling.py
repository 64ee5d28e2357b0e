"""Compiling a model block by block.

The forward of each block is compiled, not its `__call__`: hooks (block swapping, timing) stay ordinary Python outside
the graph. Blocks of one class with adapters of the same ranks share their graphs; two sizes of input make one graph for
the first size and one for all others, or a single one with `dynamic=True`.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "compiled_forward"
_FEWEST_GRAPHS = 32
_GRAPHS_PER_BLOCK = 4


def compile_blocks(
    blocks: Sequence[nn.Module],
    *,
    backend: str | Callable[..., Any] = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    cache_size_limit: int | None = None,
    grad_inputs: Collection[str] | None = None,
) -> None:
    """Compile the forward of every block; adapters and checkpointing must be applied before.

    The first trained block usually receives inputs without gradients and all later ones inputs with them. Blocks that
    train something get their floating-point inputs marked as requiring gradients, so both cases are one graph.

    Args:
        blocks: modules that are called one after the other.
        backend: torch.compile's backend.
        mode: torch.compile's mode, e.g. "reduce-overhead".
        dynamic: None: a second size makes the shapes symbolic; True: they are from the start; False: a graph per size.
        fullgraph: an interruption of the graph is an error.
        cache_size_limit: how many graphs may be made of one piece of code. One more is an error
            (`FailOnRecompileLimitHit`), not a silent return to uncompiled code. When None, a few for every block: those
            of a U-Net have sizes and channels of their own.
        grad_inputs: parameter names of the inputs to mark; all floating-point tensors when None.
    """
    config = torch._dynamo.config
    config.fail_on_recompile_limit_hit = True
    limit = cache_size_limit or max(_FEWEST_GRAPHS, _GRAPHS_PER_BLOCK * len(blocks))
    config.recompile_limit = limit
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    if any(parameter.device.type == "cpu" for block in blocks for parameter in block.parameters()):
        # torch 2.13: vectorised CPU kernels that are fused side by side give wrong gradients of transposed inputs
        import torch._inductor.config as inductor

        inductor.cpp.max_horizontal_fusion_size = 1
    options = {"backend": backend, "mode": mode, "dynamic": dynamic, "fullgraph": fullgraph}
    for block in blocks:
        if not hasattr(block.__dict__.get("forward"), _MARK):
            _compile(block, options, grad_inputs)


def decompile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Undo `compile_blocks`; compiled graphs are forgotten when the process has no other use for them."""
    for block in blocks:
        mark = getattr(block.__dict__.get("forward"), _MARK, None)
        if mark is None:
            continue
        inner, had_own = mark
        if had_own:
            block.forward = inner
        else:
            del block.forward


def _compile(block: nn.Module, options: dict[str, Any], grad_inputs: Collection[str] | None) -> None:
    inner = block.forward
    had_own = "forward" in block.__dict__
    compiled = torch.compile(inner, **options)
    names = list(inspect.signature(type(block).forward).parameters)[1:]
    trained: bool | None = None  # found out once: the walk over the block's layers costs time in every step

    def wanted(name: str | None) -> bool:
        return grad_inputs is None or name in grad_inputs

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal trained
        if torch.is_grad_enabled() and trained is None:
            trained = trains(block)
        if torch.is_grad_enabled() and trained:
            args = tuple(
                _with_grad(value) if wanted(names[index] if index < len(names) else None) else value
                for index, value in enumerate(args)
            )
            kwargs = {name: _with_grad(value) if wanted(name) else value for name, value in kwargs.items()}
        return compiled(*args, **kwargs)

    setattr(forward, _MARK, (inner, had_own))
    block.forward = forward


def trains(block: nn.Module) -> bool:
    """Whether a parameter of the block, or of an adapter installed in it, requires gradients."""
    for module in block.modules():
        owner = getattr(module.__dict__.get("forward"), "__self__", None)
        adapters = owner.parameters() if isinstance(owner, nn.Module) and owner is not module else ()
        if any(parameter.requires_grad for parameter in (*module.parameters(recurse=False), *adapters)):
            return True
    return False


def _with_grad(value: Any) -> Any:
    """The same data, requiring gradients; anything but a floating-point tensor without them stays as it is."""
    if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
        return value.detach().requires_grad_()
    return value
