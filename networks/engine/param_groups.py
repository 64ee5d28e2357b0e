"""Ranks and learning rates per block, and the optimizer groups of a network."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from library.base.errors import UserError
from library.base.logs import logger
from networks.engine.arguments import (
    FLAG,
    Argument,
    Arguments,
    BlockRates,
    parse_block_rates,
    parse_float,
    parse_int,
    parse_list,
)
from networks.engine.modules import LoRAModule
from networks.engine.selection import BlockRanks, Rank
from networks.engine.targets import DENOISER, BlockScheme, Matches, part_of_name

BLOCK_ARGUMENTS: tuple[Argument, ...] = (
    Argument(name="block_dims", parse=parse_list(parse_int), help="rank of each denoiser block"),
    Argument(name="block_alphas", parse=parse_list(parse_float), help="alpha of each denoiser block"),
    Argument(name="conv_block_dims", parse=parse_list(parse_int), help="the same for larger kernels"),
    Argument(name="conv_block_alphas", parse=parse_list(parse_float), help="the same for larger kernels"),
    Argument(name="down_lr_weight", parse=parse_block_rates, help="learning-rate factors of the down blocks"),
    Argument(name="mid_lr_weight", parse=parse_block_rates, help="learning-rate factors of the middle"),
    Argument(name="up_lr_weight", parse=parse_block_rates, help="learning-rate factors of the up blocks"),
    Argument(name="block_lr_zero_threshold", parse=parse_float, default=0.0, help="factors up to this count as 0"),
)
_RATE_ARGUMENTS = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")
_DIM_ARGUMENTS = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


def block_factors(scheme: BlockScheme, arguments: Arguments) -> list[float] | None:
    """Learning-rate factor of every block, or None when no `*_lr_weight` is given."""
    if all(arguments.get(name) is None for name in _RATE_ARGUMENTS):
        return None
    threshold = arguments["block_lr_zero_threshold"]
    factors: list[float] = []
    for name, count in zip(_RATE_ARGUMENTS, (scheme.down, scheme.mid, scheme.up)):
        rates: BlockRates = arguments[name] or BlockRates()
        if rates.values and len(rates.values) != count:
            logger.warning("%s %s: has %d values for %d blocks", FLAG, name, len(rates.values), count)
        factors += [factor if factor > threshold else 0.0 for factor in rates.expand(count)]
    return [1.0, *factors, 1.0] if scheme.ends else factors


def block_ranks(
    scheme: BlockScheme | None, arguments: Arguments, default: Rank, conv: Rank, factors: Sequence[float] | None
) -> BlockRanks | None:
    """Ranks of every block, or None when no block option is given. A block whose learning rate is 0 gets none.

    Raises:
        UserError: a list has another length than the model has blocks, or the model has no block numbering.
    """
    given = [name for name in _DIM_ARGUMENTS + _RATE_ARGUMENTS if arguments.get(name) is not None]
    if not given:
        return None
    if scheme is None:
        raise UserError(FLAG, message=f"{', '.join(given)}: only for a U-Net with numbered blocks")
    for name in _DIM_ARGUMENTS:
        values = arguments[name]
        if values is not None and len(values) != scheme.num_blocks:
            raise UserError(
                FLAG, f"{name}={','.join(map(str, values))}", f"expected {scheme.num_blocks} values, not {len(values)}"
            )
    count = scheme.num_blocks
    linear = _ranks(arguments["block_dims"], arguments["block_alphas"], default, count, factors)
    large = None
    if arguments["conv_block_dims"] is not None or conv.dim:
        large = _ranks(arguments["conv_block_dims"], arguments["conv_block_alphas"], conv, count, factors)
    return BlockRanks(linear=linear, conv=large)


def _ranks(
    dims: Sequence[int] | None,
    alphas: Sequence[float] | None,
    default: Rank,
    count: int,
    factors: Sequence[float] | None,
) -> tuple[Rank, ...]:
    dims = dims or [default.dim] * count
    alphas = alphas or [default.alpha] * count
    used = [dim if factors is None or factors[i] else 0 for i, dim in enumerate(dims)]
    return tuple(Rank(dim, alpha) for dim, alpha in zip(used, alphas))


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """Rates of the parts of a model; None means the general rate, 0 means not trained.

    Attributes:
        text_encoders: one rate per encoder.
        denoiser: rate of the denoiser.
        default: `--learning_rate`.
    """

    text_encoders: Sequence[float | None]
    denoiser: float | None
    default: float | None


def spread_text_encoder_rates(given: float | Sequence[float] | None, count: int) -> list[float | None]:
    """One rate per text encoder: a single value is for all, a shorter list goes on with its last value.

    Raises:
        UserError: more values than text encoders.
    """
    values = [given] if isinstance(given, (int, float)) else list(given or [])
    if len(values) > max(count, 1):
        raise UserError("--text_encoder_lr", values, f"this model has {count} text encoder{'s' if count != 1 else ''}")
    if not values:
        return [None] * count
    return (values + [values[-1]] * count)[:count]


@dataclass(frozen=True, kw_only=True)
class GroupRules:
    """How a network's parameters are grouped.

    Attributes:
        plus_ratio: LoRA+ ratio of a part ("denoiser", "text_encoder"), or None.
        block_factors: factor per block number, or None.
        by_name: (regex, rate) pairs of `network_reg_lrs`.
        matches: how these are read.
    """

    plus_ratio: Mapping[str, float | None] = field(default_factory=dict)
    block_factors: Sequence[float] | None = None
    by_name: Sequence[tuple[re.Pattern[str], float]] = ()
    matches: Matches = part_of_name

    @classmethod
    def of(cls, arguments: Arguments, factors: Sequence[float] | None, matches: Matches = part_of_name) -> "GroupRules":
        """Rules from the network arguments."""
        general = arguments.get("loraplus_lr_ratio")
        return cls(
            plus_ratio={
                DENOISER: arguments.get("loraplus_unet_lr_ratio") or general,
                "text_encoder": arguments.get("loraplus_text_encoder_lr_ratio") or general,
            },
            block_factors=factors,
            by_name=arguments.get("network_reg_lrs") or (),
            matches=matches,
        )


@dataclass(frozen=True, kw_only=True)
class Section:
    """Adapters that share a learning rate and a label.

    Attributes:
        label: for logs, e.g. "unet" or "textencoder 1".
        modules: the adapters.
        rate: learning rate, None or 0 when not trained.
        kind: "denoiser" or "text_encoder".
    """

    label: str
    modules: Sequence[LoRAModule]
    rate: float | None
    kind: str


def optimizer_groups(sections: Sequence[Section], rules: GroupRules) -> tuple[list[dict[str, Any]], list[str]]:
    """Groups for the optimizer and a label for each; parameters without a rate are left out.

    Within a section: the plain parameters, the LoRA+ parameters (`lora_up`), then the same for every rate of its own.
    """
    groups: list[dict[str, Any]] = []
    labels: list[str] = []
    for section in sections:
        ratio = rules.plus_ratio.get(section.kind)
        for label, rate, modules in _subsections(section, rules):
            for plus in (False, True) if ratio else (False,):
                parameters = [p for module in modules for p in _parameters(module, plus, ratio)]
                value = None if rate is None else rate * ratio if plus else rate
                if parameters and value:
                    groups.append({"params": parameters, "lr": value})
                    labels.append(label + (" plus" if plus else ""))
    return groups, labels


def _parameters(module: LoRAModule, plus: bool, ratio: float | None) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters():
        if (bool(ratio) and "lora_up" in name) == plus:
            yield parameter


def _subsections(section: Section, rules: GroupRules) -> Iterator[tuple[str, float | None, list[LoRAModule]]]:
    own: dict[int, list[LoRAModule]] = {}
    rest: list[LoRAModule] = []
    for module in section.modules:
        index = next(
            (i for i, (regex, _) in enumerate(rules.by_name) if rules.matches(regex, module.lora_name, module.path)),
            None,
        )
        (rest if index is None else own.setdefault(index, [])).append(module)
    if rules.block_factors is None or section.kind != DENOISER:
        yield section.label, section.rate, rest
    else:
        yield from _block_sections(section, rest, rules.block_factors)
    for index in sorted(own):
        label = f"reg_lr_{index}" if section.kind == DENOISER else f"{section.label} reg_lr_{index}"
        yield label, rules.by_name[index][1], own[index]


def _block_sections(
    section: Section, modules: Sequence[LoRAModule], factors: Sequence[float]
) -> Iterator[tuple[str, float | None, list[LoRAModule]]]:
    blocks: dict[int, list[LoRAModule]] = {}
    for module in modules:
        blocks.setdefault(module.block, []).append(module)
    for block in sorted(blocks):
        rate = None if section.rate is None else section.rate * factors[block]
        yield f"{section.label}_block{block}", rate, blocks[block]


def unet_block_index(path: str) -> int:
    """Block number of a layer of a diffusers-named U-Net with 4 levels (25 blocks, the first is never used)."""
    match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)", path)
    if match is None:
        return 12
    level = int(match[2])
    step = 2 if match[3] in ("downsamplers", "upsamplers") else int(match[4])
    return (1 if match[1] == "down" else 13) + 3 * level + step


def sgm_block_index(path: str) -> int:
    """Block number of a layer of an SDXL U-Net under its published names (23 blocks)."""
    match = re.match(r"(input_blocks|middle_block|output_blocks)\.(\d+)", path)
    if match is None:
        return 22 if path.startswith("out.") else 0
    return {"input_blocks": 1, "middle_block": 10, "output_blocks": 13}[match[1]] + int(match[2])
