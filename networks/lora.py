"""LoRA for Stable Diffusion 1.x, 2.x and SDXL.

SD 1.x and 2.x keys use diffusers' module paths; SDXL keys use the published ones (`input_blocks`, ...), so an SDXL
U-Net comes as a view under those names.
"""

from networks.engine.arguments import COMMON_ARGUMENTS
from networks.engine.kohya_api import bind
from networks.engine.modules import LoRAModule
from networks.engine.network import AdapterNetwork
from networks.engine.param_groups import BLOCK_ARGUMENTS, sgm_block_index, unet_block_index
from networks.engine.targets import DENOISER, BlockScheme, TargetGroup, TargetTable

CLIP_CLASSES = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")

TABLE = TargetTable(
    family="sd",
    groups=(
        TargetGroup(prefix="lora_te1", prefix_alone="lora_te", part="text_encoder:0", classes=CLIP_CLASSES),
        TargetGroup(prefix="lora_te2", part="text_encoder:1", classes=CLIP_CLASSES),
        TargetGroup(
            prefix="lora_unet",
            part=DENOISER,
            classes=("Transformer2DModel",),
            conv_classes=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
        ),
    ),
    arguments=COMMON_ARGUMENTS + BLOCK_ARGUMENTS,
    schemes=(
        BlockScheme(marker="input_blocks", down=9, mid=3, up=9, ends=True, index=sgm_block_index),
        BlockScheme(marker="down_blocks", down=12, mid=1, up=12, ends=False, index=unet_block_index),
    ),
)

LoRANetwork = AdapterNetwork
LoRAInfModule = LoRAModule
create_network, create_network_from_weights = bind(TABLE)

__all__ = ["TABLE", "LoRAInfModule", "LoRAModule", "LoRANetwork", "create_network", "create_network_from_weights"]
