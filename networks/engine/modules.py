"""The LoRA adapter of one layer.

Formula (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021): y = W x + (alpha / r) * up(down(x)).
Shapes: B batch, r rank; linear weights down [r, in], up [out, r]; convolutions down [r, in, kh, kw], up [out, r, 1, 1].

The adapter replaces the layer's inner `forward` and calls the original one, so hooks on the layer fire once and the
layer's weight is never read: it may be quantized or live elsewhere.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import CheckpointError, UserError
from networks.engine.selection import is_conv

_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """What all adapters of a network have in common.

    Attributes:
        multiplier: strength; 1 while training.
        dropout: probability of dropping an element of the down projection's output.
        rank_dropout: probability of dropping a rank component for a whole sample.
        module_dropout: probability of skipping the adapter in one call.
        ggpo_sigma, ggpo_beta: gradient-guided perturbation, on when both are given.
    """

    multiplier: float = 1.0
    dropout: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None


class LoRAModule(nn.Module):
    """Adapter of one linear or convolution layer.

    With `split` the output rows are trained in parts, each with its own pair of factors; files and `state_dict` hold
    the fused form: downs stacked, ups block diagonal, and alpha times the number of parts, because the fused rank is
    that many times larger and readers use alpha / rank.

    Attributes:
        lora_name: key prefix.
        base: the adapted layer.
        lora_dim: rank (of each part).
        scale: alpha / rank; follows the alpha of loaded weights.
        multiplier: a number, or a tensor [B] with one strength per sample.
        part, path, block: where the layer is in the model; set by the network.
    """

    part: str = ""
    path: str = ""
    block: int | None = None

    def __init__(
        self,
        lora_name: str,
        base: nn.Module,
        *,
        rank: int,
        alpha: float | None = None,
        settings: AdapterSettings | None = None,
        split: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        settings = settings or AdapterSettings()
        self.lora_name, self.lora_dim = lora_name, rank
        self._base = (base,)  # in a tuple, so that the layer does not become a child of its adapter
        self.is_conv = is_conv(base)
        self.split_dims = tuple(split) if split else None
        self._build_factors(base, rank)
        value = float(alpha) if alpha else float(rank)
        self.register_buffer("alpha", torch.tensor(value))
        self.scale = value / rank
        self.multiplier: float | Tensor = settings.multiplier
        self.dropout = settings.dropout or 0.0
        self.rank_dropout = settings.rank_dropout or 0.0
        self.module_dropout = settings.module_dropout or 0.0
        self.enabled = True
        self.org_forward = base.forward
        self._replaced: Any = None
        self._applied = False
        self.register_state_dict_post_hook(_fuse_state)
        self.register_load_state_dict_pre_hook(_adopt_state)
        self.register_load_state_dict_post_hook(_follow_alpha)

    def _build_factors(self, base: nn.Module, rank: int) -> None:
        if self.is_conv:
            if base.groups != 1:
                raise UserError(self.lora_name, message="grouped convolutions cannot have an adapter")
            self.in_dim, self.out_dim = base.in_channels, base.out_channels
            self.lora_down: nn.Module = nn.Conv2d(
                self.in_dim, rank, base.kernel_size, base.stride, base.padding, base.dilation, bias=False
            )
            self.lora_up: nn.Module = nn.Conv2d(rank, self.out_dim, (1, 1), bias=False)
        elif self.split_dims:
            self.in_dim, self.out_dim = base.in_features, base.out_features
            self.lora_down = nn.ModuleList(nn.Linear(self.in_dim, rank, bias=False) for _ in self.split_dims)
            self.lora_up = nn.ModuleList(nn.Linear(rank, size, bias=False) for size in self.split_dims)
        else:
            self.in_dim, self.out_dim = base.in_features, base.out_features
            self.lora_down = nn.Linear(self.in_dim, rank, bias=False)
            self.lora_up = nn.Linear(rank, self.out_dim, bias=False)
        for down, up in self.factors():
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)

    @property
    def base(self) -> nn.Module:
        """The adapted layer."""
        return self._base[0]

    @property
    def num_parts(self) -> int:
        """Number of separately trained parts; 1 without `split`."""
        return len(self.split_dims) if self.split_dims else 1

    def factors(self) -> list[tuple[nn.Module, nn.Module]]:
        """The (down, up) pairs, one per part."""
        return list(zip(self.lora_down, self.lora_up)) if self.split_dims else [(self.lora_down, self.lora_up)]

    def apply_to(self) -> None:
        """Replace the layer's inner forward by this adapter's."""
        base = self.base
        self._replaced = base.__dict__.get("forward", _ABSENT)
        self.org_forward = base.forward
        base.forward = self.forward
        self._applied = True

    def restore(self) -> None:
        """Give the layer back the forward it had; networks on the same layer are removed last in, first out.

        Raises:
            RuntimeError: something replaced the forward after this adapter did.
        """
        if not self._applied:
            return
        base = self.base
        if base.__dict__.get("forward") != self.forward:
            raise RuntimeError(f"{self.lora_name}: the layer's forward was replaced again; undo that first")
        if self._replaced is _ABSENT:
            del base.forward
        else:
            base.forward = self._replaced
        self._applied = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output plus the adapter's."""
        y = self.org_forward(x, *args, **kwargs)
        if not self.enabled or (isinstance(self.multiplier, float) and self.multiplier == 0.0):
            return y
        if not (self.module_dropout and self.training):
            return y + self.delta(x).to(y.dtype)
        if torch.compiler.is_compiling():  # a branch on a random number would cut the graph: weigh with 0 or 1 instead
            kept = torch.rand(1, device=x.device) >= self.module_dropout
            return y + (self.delta(x) * kept).to(y.dtype)
        if torch.rand(1) < self.module_dropout:
            return y
        return y + self.delta(x).to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """What the adapter adds, in the shape of the layer's output."""
        weight = self.factors()[0][0].weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(weight.dtype)
        if not self.split_dims:
            return self.lora_up(self._weigh(self._drop(self.lora_down(x))))
        hidden = [self._drop(down(x)) for down in self.lora_down]
        return torch.cat([up(self._weigh(h)) for up, h in zip(self.lora_up, hidden)], dim=-1)

    def _drop(self, h: Tensor) -> Tensor:
        if self.dropout and self.training:
            h = nn.functional.dropout(h, p=self.dropout)
        return h

    def _weigh(self, h: Tensor) -> Tensor:
        """Rank dropout and strength, on the small tensor between the factors."""
        strength = self.scale
        if self.rank_dropout and self.training:
            mask = torch.rand((h.size(0), self.lora_dim), device=h.device) > self.rank_dropout
            spread = (-1, self.lora_dim, 1, 1) if self.is_conv else (h.size(0), *[1] * (h.dim() - 2), self.lora_dim)
            h = h * mask.view(spread)
            strength = strength / (1 - self.rank_dropout)
        if isinstance(self.multiplier, Tensor):
            return h * (self.multiplier.to(h).view(-1, *[1] * (h.dim() - 1)) * strength)
        return h * (self.multiplier * strength)

    def delta_weight(self) -> Tensor:
        """Change of the layer's weight at multiplier 1, float32, in the weight's shape."""
        pairs = [(down.weight.float(), up.weight.float()) for down, up in self.factors()]
        return torch.cat([weight_product(up, down) for down, up in pairs]) * self.scale

    def squared_norm(self) -> Tensor:
        """Squared Frobenius norm of `delta_weight`, from r x r products only; float32 scalar."""
        total = torch.zeros((), device=self.factors()[0][0].weight.device)
        for down, up in self.factors():
            down_2d, up_2d = down.weight.float().flatten(1), up.weight.float().flatten(1)
            total = total + ((up_2d.T @ up_2d) * (down_2d @ down_2d.T)).sum()
        return total * self.scale**2

    @torch.no_grad()
    def multiply_weight(self, ratio: Tensor) -> None:
        """Scale `delta_weight` by a factor, shared evenly between the two factors."""
        root = ratio.sqrt()
        for pair in self.factors():
            for factor in pair:
                factor.weight.mul_(root.to(factor.weight))


class GgpoLoRAModule(LoRAModule):
    """LoRA with gradient-guided perturbation (GGPO): noise on the weight, scaled per output row while training.

    The noise is sigma * sqrt(n^2 + |dW_row|^2) + beta * |gradient of dW_row|^2, divided by sqrt(out), with n the mean
    row norm of the frozen weight. `alpha / r` is part of dW (the reference leaves it out).
    """

    def __init__(
        self,
        lora_name: str,
        base: nn.Module,
        *,
        rank: int,
        alpha: float | None = None,
        settings: AdapterSettings | None = None,
        split: Sequence[int] | None = None,
    ) -> None:
        super().__init__(lora_name, base, rank=rank, alpha=alpha, settings=settings, split=split)
        settings = settings or AdapterSettings()
        self.ggpo_sigma, self.ggpo_beta = float(settings.ggpo_sigma or 0), float(settings.ggpo_beta or 0)
        weight = getattr(base, "weight", None)
        if type(base).__name__ != "Linear" or weight is None or not weight.dtype.is_floating_point or split:
            raise UserError(
                "--network_args",
                f"ggpo_sigma={settings.ggpo_sigma}",
                f"needs plain, unsplit linear layers ({lora_name} is not)",
            )
        # The statistics need no gradient and no precision: up to 1000 rows, drawn once.
        rows = weight.detach()[torch.randperm(weight.shape[0], device=weight.device)[:1000]].float().norm(dim=1)
        self.register_buffer("org_weight_norm", rows.mean(), persistent=False)
        self.register_buffer("combined_norms", rows.mean().expand(self.out_dim, 1).clone(), persistent=False)
        self.register_buffer("weight_norms", torch.zeros(self.out_dim, 1), persistent=False)
        self.register_buffer("grad_norms", torch.zeros(self.out_dim, 1), persistent=False)

    @torch.no_grad()
    def update_norms(self) -> None:
        """Refresh the row norms of the weight change [out, 1]."""
        self.weight_norms.copy_(self.delta_weight().norm(dim=1, keepdim=True))
        self.combined_norms.copy_((self.org_weight_norm**2 + self.weight_norms**2).sqrt())

    @torch.no_grad()
    def update_grad_norms(self) -> None:
        """Refresh the row norms of the weight change's gradient [out, 1]; without gradients nothing changes."""
        down, up = self.lora_down.weight, self.lora_up.weight
        if down.grad is None or up.grad is None:
            return
        change = up.float() @ down.grad.float() + up.grad.float() @ down.float()
        self.grad_norms.copy_((change * self.scale).norm(dim=1, keepdim=True))

    def delta(self, x: Tensor) -> Tensor:
        """The adapter's output, plus x times the perturbation while training."""
        out = super().delta(x)
        if not self.training:
            return out
        with torch.no_grad():
            size = self.ggpo_sigma * self.combined_norms + self.ggpo_beta * self.grad_norms**2
            noise = torch.randn(self.out_dim, self.in_dim, device=x.device) * (size / math.sqrt(self.out_dim)).to(
                x.device
            )
            added = x.detach().to(out.dtype) @ noise.to(out.dtype).T
        return out + added


def weight_product(up: Tensor, down: Tensor) -> Tensor:
    """up @ down in the shape of the layer's weight: [out, in] or [out, in, kh, kw]."""
    return (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _fuse_state(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Mapping[str, Any]) -> None:
    """Replace the parts of a split adapter by their fused form."""
    if not module.split_dims:
        return
    parts = range(module.num_parts)
    downs = [state.pop(f"{prefix}lora_down.{part}.weight") for part in parts]
    ups = [state.pop(f"{prefix}lora_up.{part}.weight") for part in parts]
    state[f"{prefix}alpha"] = state[f"{prefix}alpha"] * module.num_parts
    state[f"{prefix}lora_down.weight"] = torch.cat(downs)
    state[f"{prefix}lora_up.weight"] = torch.block_diag(*ups)


def _adopt_state(module: nn.Module, state: dict[str, Any], prefix: str, *_details: Any) -> None:
    """Bring stored tensors into the form of this adapter: a missing alpha, 1x1 kernels, fused parts."""
    down_key, up_key, alpha_key = (f"{prefix}{name}" for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    if down_key not in state or up_key not in state:
        return
    down, up = state[down_key], state[up_key]
    alpha = state.get(alpha_key)
    alpha = torch.tensor(float(down.shape[0])) if alpha is None else alpha.detach().float().reshape(())
    if not module.split_dims:
        dims = 4 if module.is_conv else 2
        state[down_key], state[up_key] = _with_dims(down, dims), _with_dims(up, dims)
        state[alpha_key] = alpha
        return
    del state[down_key], state[up_key]
    blocks = [row.chunk(module.num_parts, dim=1) for row in up.split(module.split_dims, dim=0)]
    if any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j):
        raise CheckpointError(
            module.lora_name, message="was trained without split_qkv; leave split_qkv out to go on with it"
        )
    for part, piece in enumerate(down.chunk(module.num_parts)):
        state[f"{prefix}lora_down.{part}.weight"] = piece
        state[f"{prefix}lora_up.{part}.weight"] = blocks[part][part]
    state[alpha_key] = alpha / module.num_parts


def _with_dims(weight: Tensor, dims: int) -> Tensor:
    """A 2-D weight as a 1x1 kernel, or the reverse; other weights as they are."""
    if weight.dim() == 2 and dims == 4:
        return weight[:, :, None, None]
    if weight.dim() == 4 and dims == 2 and tuple(weight.shape[2:]) == (1, 1):
        return weight[:, :, 0, 0]
    return weight


def _follow_alpha(module: nn.Module, _incompatible: Any) -> None:
    """What is trained is what is saved: the scale is the one of the loaded alpha."""
    if not module.alpha.is_meta:
        module.scale = float(module.alpha) / module.lora_dim
