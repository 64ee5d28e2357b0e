"""LoRA for Lumina Image 2.0."""

from collections.abc import Callable, Sequence

from library.modules.layer_names import grouped
from networks.engine.arguments import (
    COMMON_ARGUMENTS,
    Argument,
    Arguments,
    parse_bool,
    parse_choice,
    parse_float,
    parse_int,
    parse_list,
    parse_regex_map,
)
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.targets import DENOISER, ExtraLayers, RankRule, SplitRule, TargetGroup, TargetTable

GEMMA_CLASSES = ("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP")

RANKS = (
    RankRule(argument="attn_dim", pattern=r"\.attention\."),
    RankRule(argument="mlp_dim", pattern=r"\.feed_forward\."),
    RankRule(argument="mod_dim", pattern=r"\.adaLN_modulation\."),
    RankRule(argument="refiner_dim", pattern=r"^(noise|context)_refiner\."),
)

# value of train_blocks -> starts of the paths that it leaves
BLOCKS = {
    "transformer": ("layers.",),
    "refiners": ("noise_refiner.", "context_refiner."),
    "noise_refiner": ("noise_refiner.",),
    "context_refiner": ("context_refiner.",),
}

LUMINA_ARGUMENTS = (
    Argument(name="attn_dim", parse=parse_int, help="rank of attention layers, 0 for none"),
    Argument(name="mlp_dim", parse=parse_int, help="rank of feed-forward layers, 0 for none"),
    Argument(name="mod_dim", parse=parse_int, help="rank of modulation layers, 0 for none"),
    Argument(name="refiner_dim", parse=parse_int, help="rank of what is left in the refiners, 0 for none"),
    Argument(
        name="embedder_dims",
        parse=parse_list(parse_int, length=3),
        help="ranks of x_embedder, t_embedder, cap_embedder; 0 for none",
    ),
    Argument(name="train_blocks", parse=parse_choice("all", *BLOCKS), default="all", help="which blocks"),
    Argument(name="split_qkv", parse=parse_bool, default=False, help="train q, k, v with factors of their own"),
    Argument(name="network_reg_dims", parse=parse_regex_map(parse_int), help="rank by layer name: regex=int,..."),
    Argument(name="network_reg_lrs", parse=parse_regex_map(parse_float), help="rate by layer name: regex=float,..."),
    Argument(name="verbose", parse=parse_bool, default=False, help="log every adapted layer"),
)


def select_blocks(arguments: Arguments, paths: Sequence[str]) -> Callable[[str], bool]:
    """Which layers `train_blocks` leaves; anything but "all" leaves out the final layer."""
    del paths
    starts = BLOCKS.get(arguments["train_blocks"])
    return lambda path: starts is None or path.startswith(starts)


TABLE = TargetTable(
    family="lumina",
    groups=(
        TargetGroup(prefix="lora_te", part="text_encoder:0", classes=GEMMA_CLASSES),
        TargetGroup(
            prefix="lora_unet",
            part=DENOISER,
            classes=("JointTransformerBlock", "FinalLayer"),
            ranks=RANKS,
            extras=(
                ExtraLayers(
                    argument="embedder_dims",
                    patterns=tuple(rf"^{name}(\.|$)" for name in ("x_embedder", "t_embedder", "cap_embedder")),
                ),
            ),
            splits=(SplitRule(pattern=r"\.attention\.qkv$", parts=grouped),),
        ),
    ),
    arguments=COMMON_ARGUMENTS + LUMINA_ARGUMENTS,
    select=select_blocks,
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
