"""LoRA for Stable Diffusion 3 and 3.5."""

import re
from collections.abc import Callable, Sequence

from library.base.errors import UserError
from networks.engine.arguments import (
    COMMON_ARGUMENTS,
    FLAG,
    Argument,
    Arguments,
    parse_bool,
    parse_indices,
    parse_int,
    parse_list,
)
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.targets import DENOISER, ExtraLayers, RankRule, SplitRule, TargetGroup, TargetTable
from networks.lora import CLIP_CLASSES
from networks.lora_flux import T5_CLASSES, projection_parts

RANKS = tuple(
    RankRule(argument=f"{stream}_{name}_dim", pattern=rf"\.{stream}_block\.{part}")
    for stream in ("context", "x")
    for name, part in (("attn", "attn"), ("mlp", "mlp"), ("mod", "adaLN_modulation"))
)
EMBEDDERS = (
    "context_embedder",
    "t_embedder",
    "x_embedder",
    "y_embedder",
    r"final_layer\.adaLN_modulation",
    r"final_layer\.linear",
)

SD3_ARGUMENTS = (
    *(Argument(name=rule.argument, parse=parse_int, help="rank of these layers, 0 for none") for rule in RANKS),
    Argument(
        name="emb_dims",
        parse=parse_list(parse_int, length=6),
        help="ranks of context_embedder, t_embedder, x_embedder, y_embedder, final modulation, final layer; 0 for none",
    ),
    Argument(name="train_block_indices", parse=parse_indices, help='"all", "none" or e.g. 0-3,5'),
    Argument(name="split_qkv", parse=parse_bool, default=False, help="train q, k, v with factors of their own"),
    Argument(name="train_t5xxl", parse=parse_bool, default=False, help="adapt the T5 encoder too"),
    Argument(name="verbose", parse=parse_bool, default=False, help="log every adapted layer"),
)


def select_blocks(arguments: Arguments, paths: Sequence[str]) -> Callable[[str], bool]:
    """Which layers `train_block_indices` leaves.

    Raises:
        UserError: a block number beyond the model's blocks.
    """
    indices = arguments["train_block_indices"]
    count = len({path.split(".")[1] for path in paths if re.match(r"joint_blocks\.\d+$", path)})
    if indices and max(indices) >= count:
        message = f"block {max(indices)} does not exist, the last is {count - 1}"
        raise UserError(FLAG, "train_block_indices", message)

    def accepts(path: str) -> bool:
        match = re.match(r"joint_blocks\.(\d+)\.", path)
        return match is None or indices is None or int(match[1]) in indices

    return accepts


TABLE = TargetTable(
    family="sd3",
    groups=(
        TargetGroup(prefix="lora_te1", part="text_encoder:0", classes=CLIP_CLASSES),
        TargetGroup(prefix="lora_te2", part="text_encoder:1", classes=CLIP_CLASSES),
        TargetGroup(prefix="lora_te3", part="text_encoder:2", classes=T5_CLASSES, needs="train_t5xxl"),
        TargetGroup(
            prefix="lora_unet",
            part=DENOISER,
            classes=("SingleDiTBlock",),
            ranks=RANKS,
            extras=(ExtraLayers(argument="emb_dims", patterns=tuple(rf"^{name}(\.|$)" for name in EMBEDDERS)),),
            splits=(SplitRule(pattern=r"\.attn2?\.qkv$", parts=projection_parts),),
        ),
    ),
    arguments=COMMON_ARGUMENTS + SD3_ARGUMENTS,
    select=select_blocks,
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
