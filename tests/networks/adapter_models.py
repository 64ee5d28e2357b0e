"""Models and recorded data for the adapter tests."""

import json
from pathlib import Path

import torch
from torch import nn

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_keys(name):
    """{key: shape} of a network of the reference at network_dim 4."""
    return json.loads((GOLDEN / "lora_keys" / f"{name}.json").read_text())


def golden_tensors(name):
    from safetensors.torch import load_file

    return load_file(GOLDEN / "networks" / f"{name}.safetensors")


def golden_notes():
    return json.loads((GOLDEN / "networks" / "notes.json").read_text())


def module_tree(shapes, class_names):
    """A model with the given state names; 2-D weights belong to linear layers; `class_names`: path -> class name."""
    root = nn.Module()
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(shape) != 2:
            continue
        node, parts = root, path.split(".")
        for depth, part in enumerate(parts[:-1], 1):
            if part not in node._modules:
                kind = class_names(".".join(parts[:depth]))
                node.add_module(part, type(kind, (nn.Module,), {})() if kind else nn.Module())
            node = node._modules[part]
        node.add_module(parts[-1], nn.Linear(shape[1], shape[0], bias=False))
    return root


def flux_class_names(path):
    head, _, number = path.partition(".")
    if not number.isdigit():
        return None
    return {"double_blocks": "DoubleStreamBlock", "single_blocks": "SingleStreamBlock"}.get(head)


def tiny_unet(**changes):
    """An SD 1.x U-Net: 4 levels, 8 heads."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 32,
    }
    return UNet2DConditionModel(**{**config, **changes})


def sdxl_unet(channels=(320, 640, 1280), depth=(1, 2, 10), heads=(5, 10, 20), context=2048, pooled=1280):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=2,
        cross_attention_dim=context,
        transformer_layers_per_block=depth,
        attention_head_dim=heads,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=pooled + 6 * 256,
    )


def clip_encoder(hidden=32, layers=2, heads=2, projection=None):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=100,
        max_position_embeddings=16,
        projection_dim=projection or 512,
        bos_token_id=98,
        eos_token_id=99,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def t5_encoder(d_model=4096, d_ff=10240, layers=24, heads=64):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            d_model=d_model,
            d_kv=64,
            d_ff=d_ff,
            num_layers=layers,
            num_heads=heads,
            vocab_size=100,
            feed_forward_proj="gated-gelu",
        )
    )


class Transformer2DModel(nn.Module):
    """Stands for diffusers' class of this name: adapters are chosen by class name."""

    def __init__(self, size=8, out=6):
        super().__init__()
        self.to_q = nn.Linear(size, out)
        self.to_k = nn.Linear(size, out)

    def forward(self, x):
        return self.to_q(x) + self.to_k(x)


class TinyUNet(nn.Module):
    """One attention block at the place of SD 1.x's first."""

    def __init__(self, size=8, out=6):
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attentions = nn.ModuleList([Transformer2DModel(size, out)])

    @property
    def block(self):
        return self.down_blocks[0].attentions[0]

    def forward(self, x):
        return self.block(x)


def randomise(net, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
