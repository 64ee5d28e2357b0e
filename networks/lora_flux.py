"""LoRA for FLUX.1 and Chroma."""

import re
from collections.abc import Callable, Sequence

from library.base.errors import UserError
from networks.engine.arguments import (
    COMMON_ARGUMENTS,
    FLAG,
    Argument,
    Arguments,
    parse_bool,
    parse_choice,
    parse_float,
    parse_indices,
    parse_int,
    parse_list,
    parse_regex_map,
)
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.targets import DENOISER, ExtraLayers, RankRule, SplitRule, TargetGroup, TargetTable
from networks.lora import CLIP_CLASSES

T5_CLASSES = ("T5Attention", "T5DenseGatedActDense")

RANKS = (
    RankRule(argument="img_attn_dim", pattern=r"\.img_attn\."),
    RankRule(argument="txt_attn_dim", pattern=r"\.txt_attn\."),
    RankRule(argument="img_mlp_dim", pattern=r"\.img_mlp\."),
    RankRule(argument="txt_mlp_dim", pattern=r"\.txt_mlp\."),
    RankRule(argument="img_mod_dim", pattern=r"\.img_mod\."),
    RankRule(argument="txt_mod_dim", pattern=r"\.txt_mod\."),
    RankRule(argument="single_dim", pattern=r"^single_blocks\.\d+\.linear"),
    RankRule(argument="single_mod_dim", pattern=r"^single_blocks\.\d+\.modulation\."),
)

FLUX_ARGUMENTS = (
    *(Argument(name=rule.argument, parse=parse_int, help="rank of these layers, 0 for none") for rule in RANKS),
    Argument(
        name="in_dims",
        parse=parse_list(parse_int, length=5),
        help="ranks of img_in, time_in, vector_in, guidance_in, txt_in; 0 for none",
    ),
    Argument(name="train_blocks", parse=parse_choice("all", "single", "double"), default="all", help="which blocks"),
    Argument(name="train_double_block_indices", parse=parse_indices, help='"all", "none" or e.g. 0-3,5'),
    Argument(name="train_single_block_indices", parse=parse_indices, help='"all", "none" or e.g. 0-3,5'),
    Argument(
        name="split_qkv", parse=parse_bool, default=False, help="train q, k, v (and mlp) with factors of their own"
    ),
    Argument(name="train_t5xxl", parse=parse_bool, default=False, help="adapt the T5 encoder too"),
    Argument(name="network_reg_dims", parse=parse_regex_map(parse_int), help="rank by layer name: regex=int,..."),
    Argument(name="network_reg_lrs", parse=parse_regex_map(parse_float), help="rate by layer name: regex=float,..."),
    Argument(name="ggpo_sigma", parse=parse_float, help="gradient-guided perturbation: noise by weight norm"),
    Argument(name="ggpo_beta", parse=parse_float, help="gradient-guided perturbation: noise by gradient norm"),
    Argument(name="verbose", parse=parse_bool, default=False, help="log every adapted layer"),
)


def projection_parts(in_features: int, out_features: int) -> tuple[int, ...]:
    """Rows of a fused projection: q, k, v of the input's size each, then the MLP's, if there is one."""
    rest = out_features - 3 * in_features
    return (in_features,) * 3 + ((rest,) if rest else ())


def select_blocks(arguments: Arguments, paths: Sequence[str]) -> Callable[[str], bool]:
    """Which layers `train_blocks` and the index lists leave.

    Raises:
        UserError: a block number beyond the model's blocks.
    """
    chosen = {kind: arguments[f"train_{kind}_block_indices"] for kind in ("double", "single")}
    for kind, indices in chosen.items():
        count = len({path.split(".")[1] for path in paths if re.match(rf"{kind}_blocks\.\d+$", path)})
        if indices and max(indices) >= count:
            raise UserError(
                FLAG, f"train_{kind}_block_indices", f"block {max(indices)} does not exist, the last is {count - 1}"
            )

    def accepts(path: str) -> bool:
        match = re.match(r"(double|single)_blocks\.(\d+)\.", path)
        if match is None:
            return True
        indices = chosen[match[1]]
        return arguments["train_blocks"] in ("all", match[1]) and (indices is None or int(match[2]) in indices)

    return accepts


TABLE = TargetTable(
    family="flux",
    groups=(
        TargetGroup(prefix="lora_te1", part="text_encoder:0", classes=CLIP_CLASSES),
        TargetGroup(prefix="lora_te3", part="text_encoder:1", classes=T5_CLASSES, needs="train_t5xxl"),
        TargetGroup(
            prefix="lora_unet",
            part=DENOISER,
            classes=("DoubleStreamBlock", "SingleStreamBlock"),
            ranks=RANKS,
            extras=(
                ExtraLayers(
                    argument="in_dims",
                    patterns=tuple(
                        rf"^{name}(\.|$)" for name in ("img_in", "time_in", "vector_in", "guidance_in", "txt_in")
                    ),
                ),
            ),
            splits=(
                SplitRule(pattern=r"_attn\.qkv$", parts=projection_parts),
                SplitRule(pattern=r"^single_blocks\.\d+\.linear1$", parts=projection_parts),
            ),
        ),
    ),
    arguments=COMMON_ARGUMENTS + FLUX_ARGUMENTS,
    select=select_blocks,
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
