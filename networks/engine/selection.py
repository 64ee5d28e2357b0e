"""From a table and a model to the ordered list of layers that receive an adapter."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from library.base.errors import UserError
from networks.engine.arguments import FLAG, Arguments
from networks.engine.targets import (
    CONV_CLASSES,
    DENOISER,
    LINEAR_CLASSES,
    BlockScheme,
    SplitRule,
    TargetGroup,
    TargetTable,
)


@dataclass(frozen=True)
class Rank:
    """Rank and alpha of one adapter; rank 0 means none."""

    dim: int
    alpha: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A layer that gets an adapter.

    Attributes:
        name: key prefix in files, e.g. "lora_unet_down_blocks_0_attentions_0_proj_in".
        path: module path within its part.
        part: "denoiser" or "text_encoder:<index>".
        module: the layer.
        rank: rank and alpha.
        split: output sizes of separately trained parts, or None.
        block: block number under the table's scheme, or None.
    """

    name: str
    path: str
    part: str
    module: nn.Module
    rank: Rank
    split: tuple[int, ...] | None = None
    block: int | None = None


@dataclass(frozen=True, kw_only=True)
class BlockRanks:
    """Rank and alpha per block, for 1x1 and linear layers and for larger kernels."""

    linear: tuple[Rank, ...]
    conv: tuple[Rank, ...] | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides about ranks.

    Attributes:
        default: `--network_dim`, `--network_alpha`.
        conv: `conv_dim`, `conv_alpha`; rank 0 when convolutions are not trained.
        blocks: per-block ranks, or None.
        scheme: block numbering of the denoiser, or None.
        stored: ranks found in a file; then only the modules of the file get adapters.
    """

    default: Rank
    conv: Rank
    blocks: BlockRanks | None = None
    scheme: BlockScheme | None = None
    stored: Mapping[str, Rank] | None = None


@dataclass(frozen=True)
class ModelParts:
    """The modules that can carry adapters: part name -> module."""

    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    single_text_encoder: bool = False

    @classmethod
    def of(cls, text_encoder: nn.Module | list[nn.Module | None] | None, unet: nn.Module | None) -> "ModelParts":
        """From the arguments of the network API: a module for one encoder, a list (with gaps) for several."""
        encoders = list(text_encoder) if isinstance(text_encoder, (list, tuple)) else [text_encoder]
        modules = {f"text_encoder:{index}": encoder for index, encoder in enumerate(encoders) if encoder is not None}
        if unet is not None:
            modules[DENOISER] = unet
        return cls(modules, single_text_encoder=len(encoders) == 1)

    def prefix(self, group: TargetGroup) -> str:
        """Key prefix of a group for this model."""
        return group.prefix_alone if group.prefix_alone and self.single_text_encoder else group.prefix


def is_linear(module: nn.Module) -> bool:
    """Whether the layer is a linear one, quantized or not."""
    return type(module).__name__ in LINEAR_CLASSES


def is_conv(module: nn.Module) -> bool:
    """Whether the layer is a two-dimensional convolution."""
    return type(module).__name__ in CONV_CLASSES


def layer_name(prefix: str, path: str) -> str:
    """Key prefix of a layer in adapter files."""
    return f"{prefix}.{path}".replace(".", "_")


def select_targets(parts: ModelParts, table: TargetTable, arguments: Arguments, plan: Plan) -> list[Target]:
    """Layers that receive adapters, text encoders first, each part in module order.

    Raises:
        UserError: two different layers share a key name, or a block number does not exist.
    """
    targets: dict[str, Target] = {}
    for group in table.groups:
        root = parts.modules.get(group.part)
        if root is None:
            continue
        found = (
            _stored_targets(parts.prefix(group), root, group, plan, arguments)
            if plan.stored is not None
            else _group_targets(parts.prefix(group), root, group, _Chooser(table, arguments, plan, root))
        )
        for target in found:
            known = targets.setdefault(target.name, target)
            if known.module is not target.module:
                raise UserError(
                    target.name,
                    message=f"two layers would share this key: {known.path} and {target.path} ({group.part})",
                )
    return list(targets.values())


class _Chooser:
    """Decides the rank of a layer from the arguments."""

    def __init__(self, table: TargetTable, arguments: Arguments, plan: Plan, root: nn.Module) -> None:
        self.table, self.arguments, self.plan = table, arguments, plan
        self.paths = [path for path, _ in root.named_modules()]
        self.conv_wanted = plan.conv.dim > 0 or (plan.blocks is not None and plan.blocks.conv is not None)

    def accepts(self, group: TargetGroup) -> Callable[[str], bool]:
        """A predicate over paths: whether a layer inside a target class is wanted at all."""
        if self.table.select is None or (group.part != DENOISER and not self.table.selects_text):
            return lambda _path: True
        return self.table.select(self.arguments, self.paths)

    def block(self, group: TargetGroup, path: str) -> int | None:
        return self.plan.scheme.index(path) if self.plan.scheme and group.part == DENOISER else None

    def rank(self, group: TargetGroup, name: str, path: str, module: nn.Module) -> Rank:
        """Rank by, in this order: network_reg_dims, block ranks, rank rules, the defaults."""
        default = self.plan.default
        for pattern, dim in self.arguments.get("network_reg_dims") or ():
            if self.table.matches(pattern, name, path):
                return Rank(dim, default.alpha)
        large = is_conv(module) and tuple(module.kernel_size) != (1, 1)
        block = self.block(group, path)
        if self.plan.blocks is not None and block is not None:
            ranks = self.plan.blocks.conv if large else self.plan.blocks.linear
            return ranks[block] if ranks else Rank(0, 0)
        if large:
            return self.plan.conv
        for rule in group.ranks:
            dim = self.arguments[rule.argument]
            if dim is not None and re.search(rule.pattern, path):
                return Rank(dim, default.alpha)
        return default


def _group_targets(prefix: str, root: nn.Module, group: TargetGroup, chooser: _Chooser) -> Iterator[Target]:
    if group.needs and not chooser.arguments[group.needs]:
        return
    accepts = chooser.accepts(group)
    classes = group.classes + (group.conv_classes if chooser.conv_wanted else ())
    for parent_path, parent in root.named_modules():
        if type(parent).__name__ not in classes:
            continue
        for child_path, child in parent.named_modules():
            path = ".".join(part for part in (parent_path, child_path) if part)
            if not (is_linear(child) or is_conv(child)) or not accepts(path):
                continue
            rank = chooser.rank(group, layer_name(prefix, path), path, child)
            if rank.dim:
                yield _target(prefix, path, group, child, rank, chooser.arguments, chooser.block(group, path))
    yield from _extra_targets(prefix, root, group, chooser)


def _extra_targets(prefix: str, root: nn.Module, group: TargetGroup, chooser: _Chooser) -> Iterator[Target]:
    for extra in group.extras:
        for pattern, dim in zip(extra.patterns, chooser.arguments[extra.argument] or (), strict=False):
            for path, module in root.named_modules():
                if dim and re.search(pattern, path) and (is_linear(module) or is_conv(module)):
                    rank = Rank(dim, chooser.plan.default.alpha)
                    yield _target(prefix, path, group, module, rank, chooser.arguments, None)


def _stored_targets(
    prefix: str, root: nn.Module, group: TargetGroup, plan: Plan, arguments: Arguments
) -> Iterator[Target]:
    """Every layer of a part that the file has: also those outside the target classes, which some files contain."""
    for path, module in root.named_modules():
        stored = plan.stored.get(layer_name(prefix, path))
        if stored is None or not (is_linear(module) or is_conv(module)):
            continue
        block = plan.scheme.index(path) if plan.scheme and group.part == DENOISER else None
        split = _split(group, path, module, arguments)
        rank = stored
        if split:
            if stored.dim % len(split):
                raise UserError(
                    FLAG,
                    "split_qkv=True",
                    f"{layer_name(prefix, path)} has rank {stored.dim} in the file, not a multiple of {len(split)}",
                )
            rank = Rank(stored.dim // len(split), stored.alpha / len(split))
        yield Target(
            name=layer_name(prefix, path),
            path=path,
            part=group.part,
            module=module,
            rank=rank,
            split=split,
            block=block,
        )


def _target(
    prefix: str, path: str, group: TargetGroup, module: nn.Module, rank: Rank, arguments: Arguments, block: int | None
) -> Target:
    return Target(
        name=layer_name(prefix, path),
        path=path,
        part=group.part,
        module=module,
        rank=rank,
        split=_split(group, path, module, arguments),
        block=block,
    )


def split_rule(group: TargetGroup, path: str) -> SplitRule | None:
    """The rule by which `split_qkv` would split a layer."""
    return next((rule for rule in group.splits if re.search(rule.pattern, path)), None)


def _split(group: TargetGroup, path: str, module: nn.Module, arguments: Arguments) -> tuple[int, ...] | None:
    rule = split_rule(group, path) if arguments.get("split_qkv") else None
    return rule.parts(module.in_features, module.out_features) if rule else None


def split_counts(parts: ModelParts, table: TargetTable) -> dict[str, int]:
    """Key names of the layers that `split_qkv` splits -> number of parts."""
    counts = {}
    for group in table.groups:
        root = parts.modules.get(group.part)
        if root is None or not group.splits:
            continue
        for path, module in root.named_modules():
            rule = split_rule(group, path) if is_linear(module) else None
            if rule:
                counts[layer_name(parts.prefix(group), path)] = len(rule.parts(module.in_features, module.out_features))
    return counts
