"""Adapter files in diffusers' own loaders."""

import json

import pytest
import torch
from support.runs import GOLDEN, dataset_toml, network_arguments, run_training

from library import sd_utils
from library.base.safetensors_io import load_file
from library.modules.clip import load_clip_text
from library.modules.components import Need
from library.modules.published_view import published_view
from library.modules.vae import load_vae

pytestmark = pytest.mark.third_party


def components(inputs):
    file = sd_utils.open_checkpoint(inputs.model("sd15"))
    unet = sd_utils.load_unet(file, Need())
    encoder = load_clip_text(file, "cond_stage_model.transformer.", need=Need())
    return file, unet, encoder


@pytest.fixture(scope="module")
def adapter_file(inputs, tmp_path_factory):
    """An adapter of the default kind, trained for a few large steps so that it changes something."""
    folder = tmp_path_factory.mktemp("sd")
    toml = dataset_toml(folder, inputs)
    run_training("sd", network_arguments("sd", inputs, folder, toml, "--learning_rate", "2e-2"))
    return folder / "out" / "last.safetensors"


def test_pipeline_changes_as_our_forward(adapter_file, inputs):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from networks import lora

    file, unet, encoder = components(inputs)
    ids = torch.tensor([[912, 20, 31, 913] + [913] * 73])
    noisy = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    time = torch.tensor([400])

    def outputs(unet, encoder):
        with torch.no_grad():
            text = encoder(ids).last_hidden_state
            return text, unet(noisy, time, text).sample

    plain = outputs(unet, encoder)
    views = published_view(encoder, "clip"), published_view(unet, "diffusers")
    network, _ = lora.create_network_from_weights(1.0, str(adapter_file), None, *views)
    network.apply_to(*views, True, True)
    network.load_weights(str(adapter_file))
    ours = outputs(unet, encoder)

    _, unet, encoder = components(inputs)
    pipeline = StableDiffusionPipeline(
        vae=load_vae(file, "first_stage_model.", dtype=torch.float32, device="cpu"),
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(inputs.folder / "tokenizers" / "openai_clip-vit-large-patch14"),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(adapter_file.parent), weight_name=adapter_file.name)
    theirs = outputs(pipeline.unet, pipeline.text_encoder)
    for before, mine, other in zip(plain, ours, theirs):
        assert (mine - before).abs().max() > 1e-2
        assert (mine - other).abs().max() <= 1e-4


def test_flux_conversion_accepts_published_names_and_shapes():
    """Keys and shapes of a FLUX.1 dev adapter at the published width, through diffusers' converter and its model."""
    from accelerate import init_empty_weights
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    shapes = json.loads((GOLDEN / "lora_keys" / "lora_flux_flux_unet_only.json").read_text())
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    state = {key: torch.tensor(1.0) if key.endswith(".alpha") else tensor for key, tensor in state.items()}
    converted = _convert_kohya_flux_lora_to_diffusers(dict(state))
    with init_empty_weights():
        model = FluxTransformer2DModel(guidance_embeds=True)
    layers = dict(model.named_modules())
    pairs = {key.rsplit(".lora_", 1)[0] for key in converted}
    assert len(pairs) > 400
    for pair in pairs:
        layer = layers[pair.removeprefix("transformer.")]
        down, up = converted[f"{pair}.lora_A.weight"], converted[f"{pair}.lora_B.weight"]
        assert (up.shape[0], down.shape[1]) == (layer.out_features, layer.in_features), pair
        assert up.shape[1] == down.shape[0]


def published_unet(name):
    """diffusers' U-Net of the published size, without data."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        if name == "sd15":
            return UNet2DConditionModel(cross_attention_dim=768)
        return UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.mark.parametrize("case", ["lora_sd15", "lora_sdxl", "lora_sdxl_conv"])
def test_unet_conversion_accepts_published_names_and_shapes(case):
    """Every layer of the file is one of the model's, and fits it."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )
    from diffusers.utils import convert_unet_state_dict_to_peft

    shapes = json.loads((GOLDEN / "lora_keys" / f"{case}.json").read_text())
    state = {key: torch.zeros(shape, device="meta") for key, shape in shapes.items()}
    state = {key: torch.tensor(1.0) if key.endswith(".alpha") else tensor for key, tensor in state.items()}
    unet = published_unet(case.split("_")[1])
    if "sdxl" in case:
        state = _maybe_map_sgm_blocks_to_diffusers(state, unet.config)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(state)
    ours = {key.removeprefix("unet."): value for key, value in converted.items() if key.startswith("unet.")}
    factors = convert_unet_state_dict_to_peft(ours)
    layers = dict(unet.named_modules())
    pairs = {key.rsplit(".lora_", 1)[0] for key in factors}
    assert len(pairs) == sum(key.startswith("lora_unet") and key.endswith(".alpha") for key in shapes) > 150
    assert len(alphas) == sum(key.endswith(".alpha") for key in shapes)
    for pair in pairs:
        weight = layers[pair].weight
        assert factors[f"{pair}.lora_A.weight"].shape[1:] == weight.shape[1:], pair
        assert factors[f"{pair}.lora_B.weight"].shape[0] == weight.shape[0], pair


def test_trained_flux_file_has_published_names(inputs, tmp_path):
    """Our tiny file and the published key list agree but for the number of blocks."""
    run_training(
        "flux", network_arguments("flux", inputs, tmp_path, dataset_toml(tmp_path, inputs), "--max_train_steps", "1")
    )
    ours = set(load_file(tmp_path / "out" / "last.safetensors"))
    published = set(json.loads((GOLDEN / "lora_keys" / "lora_flux_flux.json").read_text()))
    assert ours <= published
    assert {key for key in published if "blocks_0_" in key or "layers_0_" in key} <= ours
