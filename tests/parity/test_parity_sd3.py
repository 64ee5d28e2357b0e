"""Stable Diffusion 3 and 3.5: our transformer, the text encoders and the VAE against diffusers and transformers."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from support import diffusers_models
from support.gradients import gradients_of
from support.runs import GOLDEN

from library import sd3_utils
from library.base.safetensors_io import TensorFile, load_file
from library.modules.clip import load_projected_clip_text
from library.modules.components import Need
from library.modules.vae import decode, encode_mode, load_vae
from library.sd3_models import MMDiT, MMDiTParams, scaled_table

pytestmark = pytest.mark.parity
# heads that are not as many as their channels, which tells the two apart
SMALL = MMDiTParams(
    in_channels=16,
    out_channels=16,
    patch_size=2,
    hidden_size=192,
    num_heads=3,
    depth=3,
    mlp_size=768,
    context_size=48,
    pooled_size=32,
    pos_embed_size=12,
)
KINDS = {
    "medium": SMALL,
    "5-large": dataclasses.replace(SMALL, qk_norm=True),
    "5-medium": dataclasses.replace(SMALL, qk_norm=True, dual_blocks=(0, 1)),
}


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def random_model(params):
    torch.manual_seed(0)
    model = MMDiT(params).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            scale = 0.3 if tensor.ndim != 2 else tensor.shape[1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape) * scale + (1.0 if ".ln_" in name else 0.0))
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_transformer_equals_diffusers(kind):
    """Forward and one gradient; the second attention of 3.5 medium has heads of the head size."""
    ours = random_model(KINDS[kind])
    theirs = diffusers_models.sd3(ours)
    generator = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 16, 12, 8, generator=generator), torch.randn(2, 7, 48, generator=generator)
    pooled, times = torch.randn(2, 32, generator=generator), torch.tensor([901.0, 17.5])
    block = 1
    weight = ours.joint_blocks[block].context_block.mlp.fc1.weight.requires_grad_()
    other = theirs.transformer_blocks[block].ff_context.net[0].proj.weight.requires_grad_()
    mine = ours(latents, times, context, pooled)
    reference = theirs(latents, context, pooled, times, return_dict=False)[0]
    close(mine, reference)
    target = torch.randn(mine.shape, generator=generator)
    (mine * target).sum().backward()
    (reference * target).sum().backward()
    close(weight.grad, other.grad)


@pytest.mark.parametrize("name", ["sd3_medium", "sd35_medium", "sd35_large"])
def test_every_name_and_shape_of_the_published_files(name):
    keys = json.loads((GOLDEN / "keys" / f"{name}_mmdit.json").read_text())
    params = sd3_utils.mmdit_params(SimpleNamespace(shapes=keys, path=name, metadata={}), "")
    with torch.device("meta"):
        model = MMDiT(params)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == keys
    assert params.dual_blocks == (tuple(range(13)) if name == "sd35_medium" else ())


@pytest.mark.parametrize("name", ["clip_l", "clip_g"])
def test_clip_equals_transformers(inputs, name):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    activation = "quick_gelu" if name == "clip_l" else "gelu"
    file = TensorFile(inputs.model(name))
    ours = load_projected_clip_text(file, "", need=Need(), part=name, activation=activation)
    width = 64 if name == "clip_l" else 128
    config = CLIPTextConfig(
        vocab_size=914,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=12 if name == "clip_l" else 3,
        num_attention_heads=width // 64,
        projection_dim=width,
        hidden_act=activation,
        bos_token_id=912,
        eos_token_id=913,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    # this CLIP-L has no projection, as many published files
    state = {"text_projection.weight": torch.eye(width), **load_file(inputs.model(name))}
    theirs.load_state_dict({key: tensor for key, tensor in state.items() if key in theirs.state_dict()})
    ids = torch.cat((torch.randint(0, 900, (2, 20)), torch.full((2, 57), 913)), dim=1)
    mask = torch.tensor([[1] * 21 + [0] * 56] * 2)
    for seen in (None, mask):
        mine = ours(ids, attention_mask=seen, output_hidden_states=True)
        reference = theirs(ids, attention_mask=seen, output_hidden_states=True)
        close(mine.hidden_states[-2], reference.hidden_states[-2])
        close(mine.text_embeds, reference.text_embeds)
    layer = "text_model.encoder.layers.1.mlp.fc1.weight"
    close(*gradients_of(ours, theirs, lambda module: module(ids).text_embeds, layer))


def test_autoencoder_equals_diffusers_conversion(inputs):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = load_vae(TensorFile(inputs.model("sd3_medium")), "first_stage_model.", dtype=torch.float32, device="cpu")
    assert not vae.config.use_quant_conv and vae.config.latent_channels == 16
    theirs = AutoencoderKL.from_config(dict(vae.config))
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(inputs.model("sd3_medium")), dict(vae.config)))
    images = torch.rand(1, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        latents = encode_mode(vae, images)
        close(latents, theirs.encode(images).latent_dist.mean)
        close(decode(vae, latents), theirs.decode(latents).sample.clamp(-1, 1))
    close(*gradients_of(vae, theirs, lambda module: module.encode(images).latent_dist.mean, "encoder.conv_in.weight"))


def test_positions_are_cut_from_the_middle_or_a_corner():
    model = random_model(SMALL)
    grid = model.pos_embed.view(12, 12, -1)
    assert torch.equal(model.positions(4, 6)[0], grid[4:8, 3:9].flatten(0, 1))
    corners = torch.tensor([[0.0, 0.0], [0.999, 0.999]])
    first, last = model.positions(4, 6, corners)
    assert torch.equal(first, grid[:4, :6].flatten(0, 1)) and torch.equal(last, grid[8:, 6:].flatten(0, 1))
    with pytest.raises(ValueError, match="13 x 4 tokens are more than the 12 x 12 positions"):
        model.positions(13, 4)


def test_scaled_table_is_diffusers():
    """The table of a resolution spans the same 16 units in the middle, whatever its number of tokens."""
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    ours = scaled_table(64, 16, 24)
    assert ours.shape == (576, 64)
    middle = ours.view(24, 24, 64)[4:20, 4:20].flatten(0, 1)
    theirs = get_2d_sincos_pos_embed(64, 16, base_size=16, interpolation_scale=1.0, output_type="pt")
    close(middle, theirs.float())
