"""LoRA for HunyuanImage 2.1."""

from networks.engine.arguments import (
    COMMON_ARGUMENTS,
    Argument,
    parse_bool,
    parse_float,
    parse_int,
    parse_regex_map,
)
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.targets import DENOISER, SplitRule, TargetGroup, TargetTable
from networks.lora_flux import projection_parts

HUNYUAN_IMAGE_ARGUMENTS = (
    Argument(
        name="split_qkv", parse=parse_bool, default=False, help="train q, k, v (and mlp) with factors of their own"
    ),
    Argument(name="network_reg_dims", parse=parse_regex_map(parse_int), help="rank by layer name: regex=int,..."),
    Argument(name="network_reg_lrs", parse=parse_regex_map(parse_float), help="rate by layer name: regex=float,..."),
    Argument(name="ggpo_sigma", parse=parse_float, help="gradient-guided perturbation: noise by weight norm"),
    Argument(name="ggpo_beta", parse=parse_float, help="gradient-guided perturbation: noise by gradient norm"),
    Argument(name="verbose", parse=parse_bool, default=False, help="log every adapted layer"),
)

TABLE = TargetTable(
    family="hunyuan_image",
    groups=(
        TargetGroup(
            prefix="lora_unet",
            part=DENOISER,
            classes=("MMDoubleStreamBlock", "MMSingleStreamBlock"),
            splits=(
                SplitRule(pattern=r"_attn_qkv$", parts=projection_parts),
                SplitRule(pattern=r"^single_blocks\.\d+\.linear1$", parts=projection_parts),
            ),
        ),
    ),
    arguments=COMMON_ARGUMENTS + HUNYUAN_IMAGE_ARGUMENTS,
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
