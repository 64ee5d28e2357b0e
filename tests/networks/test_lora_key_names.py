"""Key names and shapes of adapter files, at real model sizes, against lists recorded from the reference."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from adapter_models import (
    GOLDEN,
    clip_encoder,
    flux_class_names,
    golden_keys,
    module_tree,
    sdxl_unet,
    t5_encoder,
    tiny_unet,
)

from library.modules.published_view import published_view

CASES = json.loads((GOLDEN / "lora_keys" / "cases.json").read_text())


@pytest.fixture(scope="module")
def models():
    """Real-size models without data."""
    with torch.device("meta"):
        clip_l = published_view(clip_encoder(768, 12, 12), "clip")
        clip_g = published_view(clip_encoder(1280, 32, 20, projection=1280), "clip")
        flux = shapes("flux_dev")
        schnell = {name: shape for name, shape in flux.items() if not name.startswith("guidance_in")}
        real = {"block_out_channels": (320, 640, 1280, 1280)}
        t5 = t5_encoder()
        return {
            "sd15": (clip_l, published_view(tiny_unet(**real, cross_attention_dim=768), "diffusers")),
            "sd2": (
                published_view(clip_encoder(1024, 23, 16), "clip"),
                published_view(tiny_unet(**real, cross_attention_dim=1024, use_linear_projection=True), "diffusers"),
            ),
            "sdxl": ([clip_l, clip_g], published_view(sdxl_unet(), "sgm")),
            "flux": ([clip_l, t5], module_tree(flux, flux_class_names)),
            "flux_schnell": ([clip_l, t5], module_tree(schnell, flux_class_names)),
            "lumina": lumina_models(),
            "hunyuan_image": ([None, None], hunyuan_image()),
            "sd3_medium": ([clip_l, clip_g, t5], mmdit("sd3_medium")),
            "sd3_sd35m": ([clip_l, clip_g, t5], mmdit("sd35_medium")),
            "sd3_sd35l": ([clip_l, clip_g, t5], mmdit("sd35_large")),
            "anima": anima_models(),
            "flux_chroma": ([None, t5], module_tree(shapes("chroma"), flux_class_names)),
        }


def anima_models():
    """Qwen3-0.6B and the transformer with its text adapter."""
    from transformers import Qwen3Config, Qwen3Model

    from library.anima_models import Anima, AnimaParams
    from library.modules.llm_adapter import LLMAdapterParams

    adapter = LLMAdapterParams(1024, 1024, 1024, 4096, 16, 6, 32128)
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    qwen3 = Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=151936))
    return qwen3, Anima(AnimaParams(16, 16, 2048, 8192, 16, 28, 1024, 256, (1.0, 4.0, 4.0), adapter))


def shapes(name):
    return json.loads((GOLDEN / "networks" / f"{name}_shapes.json").read_text())


def mmdit(name):
    """The transformer whose sizes the published key list tells."""
    from library.sd3_models import MMDiT
    from library.sd3_utils import mmdit_params

    keys = json.loads((GOLDEN / "keys" / f"{name}_mmdit.json").read_text())
    return MMDiT(mmdit_params(SimpleNamespace(shapes=keys, path=name, metadata={}), ""))


def hunyuan_image():
    """The transformer whose sizes the published key list tells."""
    from library.hunyuan_image_models import HunyuanImage
    from library.hunyuan_image_utils import hunyuan_image_params

    keys = json.loads((GOLDEN / "keys" / "hunyuan_image_transformer.json").read_text())
    return HunyuanImage(hunyuan_image_params(SimpleNamespace(shapes=keys, path="published", metadata={}), ""))


def lumina_models():
    from transformers import Gemma2Config, Gemma2Model

    from library.lumina_models import LuminaParams, NextDiT

    sizes = {"hidden_size": 2304, "num_heads": 24, "num_kv_heads": 8, "mlp_size": 9216, "time_size": 1024}
    counts = {"num_layers": 26, "num_refiner_layers": 2, "num_context_layers": 2}
    params = LuminaParams(in_channels=16, cap_feat_dim=2304, axes_dim=(32, 32, 32), **sizes, **counts)
    return [Gemma2Model(Gemma2Config())], NextDiT(params)


def model_of(case):
    for name in ("lumina", "hunyuan_image"):
        if name in case:
            return name
    if "_sd3_" in case:
        return next(name for name in ("sd3_medium", "sd3_sd35m", "sd3_sd35l") if name in case)
    if "flux" in case:
        return next((name for name in ("flux_schnell", "flux_chroma") if name.split("_")[1] in case), "flux")
    return next(name for name in ("sdxl", "sd15", "sd2", "anima") if name in case)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_equal_the_recorded_list(case, models):
    facts = CASES[case]
    text_encoder, unet = models[model_of(case)]
    module = importlib.import_module(facts["module"])
    with torch.device("meta"):
        network = module.create_network(1.0, facts["dim"], facts["alpha"], None, text_encoder, unet, **facts["args"])
    train_te = facts["train_text_encoder"] and any(module.part != "denoiser" for module in network.loras)
    network.apply_to(text_encoder, unet, train_te, True)
    try:
        state = network.state_dict()
    finally:
        network.restore_forwards()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == golden_keys(case)
    assert len(network.loras) == facts["n_modules"]


def test_text_encoder_keys_come_first(models):
    text_encoder, unet = models["sdxl"]
    module = importlib.import_module("networks.lora")
    with torch.device("meta"):
        network = module.create_network(1.0, 4, 1.0, None, text_encoder, unet)
    names = [adapter.lora_name.split("_")[1] for adapter in network.loras]
    assert names == sorted(names, key=["te1", "te2", "unet"].index)
    assert {"te1", "te2", "unet"} == set(names)


def test_our_flux_model_carries_the_names():
    from library.flux_models import Flux, FluxParams

    params = FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=19,
        depth_single_blocks=38,
        axes_dim=(16, 56, 56),
        guidance_embed=True,
    )
    module = importlib.import_module("networks.lora_flux")
    with torch.device("meta"):
        flux = Flux(params)
        network = module.create_network(1.0, 4, 1.0, None, [None, None], flux, in_dims="4,4,4,4,4")
    network.apply_to([None, None], flux, False, True)
    state = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    assert state == golden_keys("lora_flux_flux_in_dims")


def test_a_split_network_on_double_blocks(models):
    """The reference fails here; the fused file has three times the rank on qkv."""
    text_encoder, unet = models["flux"]
    module = importlib.import_module("networks.lora_flux")
    with torch.device("meta"):
        network = module.create_network(1.0, 4, 1.0, None, text_encoder, unet, split_qkv="true", train_blocks="double")
    network.apply_to(text_encoder, unet, False, True)
    state = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    network.restore_forwards()
    plain = golden_keys("lora_flux_flux_train_blocks_double")
    assert set(state) == set(plain)
    assert state["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"] == [12, 3072]
    assert state["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] == [9216, 12]
    assert state["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"] == [4, 3072]


def test_convolution_targets_do_not_leak_into_the_next_network(models):
    text_encoder, unet = models["sd15"]
    module = importlib.import_module("networks.lora")
    counts = []
    for args in ({}, {"conv_dim": "4"}, {}):
        with torch.device("meta"):
            counts.append(len(module.create_network(1.0, 4, 1.0, None, text_encoder, unet, **args).loras))
    assert counts == [264, 350, 264]
