"""Class names and attribute paths that outside tools rely on: key names are made of them."""

import inspect

import pytest
import torch
from adapter_models import clip_encoder, sdxl_unet, t5_encoder, tiny_unet
from torch import nn

from library.modules.published_view import published_view
from networks import lora, lora_flux
from networks.engine.selection import is_conv, is_linear

API = (
    "apply_to",
    "load_weights",
    "save_weights",
    "merge_to",
    "is_mergeable",
    "prepare_optimizer_params",
    "prepare_optimizer_params_with_multiple_te_lrs",
    "enable_gradient_checkpointing",
    "prepare_grad_etc",
    "on_epoch_start",
    "get_trainable_params",
    "set_multiplier",
    "apply_max_norm_regularization",
    "update_norms",
    "update_grad_norms",
    "weight_norms",
    "grad_norms",
    "combined_weight_norms",
    "backup_weights",
    "restore_weights",
    "pre_calculation",
)


def class_of(module, path):
    return type(module.get_submodule(path)).__name__


@pytest.mark.parametrize("module", [lora, lora_flux])
def test_entry_points_and_classes(module):
    create = list(inspect.signature(module.create_network).parameters)
    assert create[:7] == ["multiplier", "network_dim", "network_alpha", "vae", "text_encoder", "unet", "neuron_dropout"]
    load = list(inspect.signature(module.create_network_from_weights).parameters)
    assert load[:7] == ["multiplier", "file", "vae", "text_encoder", "unet", "weights_sd", "for_inference"]
    assert all(callable(getattr(module.LoRANetwork, name)) for name in API)
    assert issubclass(module.LoRAModule, nn.Module)
    assert issubclass(module.LoRAInfModule, nn.Module)


def test_flux_classes_and_paths():
    from library.flux_models import Flux, FluxParams

    params = FluxParams(
        in_channels=16,
        out_channels=16,
        vec_in_dim=8,
        context_in_dim=8,
        hidden_size=16,
        mlp_ratio=4.0,
        num_heads=2,
        depth=1,
        depth_single_blocks=1,
        axes_dim=(2, 2, 4),
        guidance_embed=True,
    )
    with torch.device("meta"):
        flux = published_view(Flux(params), "own")
    assert class_of(flux, "double_blocks.0") == "DoubleStreamBlock"
    assert class_of(flux, "single_blocks.0") == "SingleStreamBlock"
    for path in (
        "img_attn.qkv",
        "img_attn.proj",
        "img_mlp.0",
        "img_mlp.2",
        "img_mod.lin",
        "txt_attn.qkv",
        "txt_mod.lin",
    ):
        assert is_linear(flux.get_submodule(f"double_blocks.0.{path}")), path
    for path in ("linear1", "linear2", "modulation.lin"):
        assert is_linear(flux.get_submodule(f"single_blocks.0.{path}")), path
    for path in ("img_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer", "txt_in"):
        assert is_linear(flux.get_submodule(path)), path


def test_sd_classes_and_paths():
    with torch.device("meta"):
        unet = published_view(tiny_unet(), "diffusers")
    assert class_of(unet, "time_embedding") != "TimestepEmbedding"  # else LyCORIS 4.1 adapts its layers twice
    assert is_linear(unet.get_submodule("time_embedding.linear_1"))
    assert class_of(unet, "down_blocks.0.attentions.0") == "Transformer2DModel"
    assert class_of(unet, "down_blocks.0.resnets.0") == "ResnetBlock2D"
    assert class_of(unet, "down_blocks.0.downsamplers.0") == "Downsample2D"
    assert class_of(unet, "up_blocks.0.upsamplers.0") == "Upsample2D"
    assert is_conv(unet.get_submodule("mid_block.resnets.1.conv2"))


def test_sdxl_classes_and_paths():
    with torch.device("meta"):
        unet = published_view(sdxl_unet(), "sgm")
    assert type(unet).__name__ == "UNet2DConditionModel"
    assert class_of(unet, "input_blocks.4.1") == "Transformer2DModel"
    assert class_of(unet, "input_blocks.4.1.transformer_blocks.0") == "BasicTransformerBlock"
    assert class_of(unet, "input_blocks.1.0") == "ResnetBlock2D"
    assert class_of(unet, "input_blocks.3.0") == "Downsample2D"
    assert class_of(unet, "output_blocks.2.2") == "Upsample2D"
    assert class_of(unet, "middle_block.1") == "Transformer2DModel"
    assert class_of(unet, "time_embed") == class_of(unet, "label_emb.0") == "Sequential"
    assert is_conv(unet.get_submodule("input_blocks.3.0.op"))
    assert is_linear(unet.get_submodule("output_blocks.0.0.emb_layers.1"))


def test_text_encoder_classes_and_paths():
    clip = published_view(clip_encoder(), "clip")
    assert type(clip).__name__ == "CLIPTextModel"
    assert class_of(clip, "text_model.encoder.layers.0.self_attn") == "CLIPAttention"
    assert class_of(clip, "text_model.encoder.layers.0.mlp") == "CLIPMLP"
    projected = clip_encoder(projection=24)
    assert published_view(projected, "clip") is projected
    t5 = published_view(t5_encoder(32, 64, 1, 2), "own")
    assert class_of(t5, "encoder.block.0.layer.0.SelfAttention") == "T5Attention"
    assert class_of(t5, "encoder.block.0.layer.1.DenseReluDense") == "T5DenseGatedActDense"
