"""Stable Diffusion 1.x: what we load against diffusers' conversion, and our noise process against its schedulers."""

import pytest
import torch
from support.gradients import gradients_of

from library import sd_utils
from library.base.safetensors_io import load_file
from library.diffusion.ddpm import Ddpm, alphas_cumprod
from library.diffusion.flow import discrete_sigmas
from library.modules.clip import load_clip_text
from library.modules.components import Need
from library.modules.vae import encode_mode, load_vae
from library.train_util import make_options

pytestmark = pytest.mark.parity


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def checkpoint(inputs):
    return sd_utils.open_checkpoint(inputs.model("sd15"))


@pytest.fixture(scope="module")
def unet(checkpoint):
    return sd_utils.load_unet(checkpoint, Need())


def part(path, prefix):
    return {key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)}


def test_unet_equals_diffusers_conversion(unet, inputs):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 64, 64),
        cross_attention_dim=64,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    state = load_file(inputs.model("sd15"))
    theirs.load_state_dict(convert_ldm_unet_checkpoint(state, dict(theirs.config)))
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 16, 24, generator=generator)
    text = torch.randn(2, 77, 64, generator=generator)
    times = torch.tensor([17, 801])
    with torch.no_grad():
        close(unet(noisy, times.float(), text).sample, theirs.eval()(noisy, times, text).sample)
    weight = unet.mid_block.attentions[0].proj_in.weight.requires_grad_()
    other = theirs.requires_grad_(False).mid_block.attentions[0].proj_in.weight.requires_grad_()
    unet(noisy, times.float(), text).sample.square().sum().backward()
    theirs(noisy, times, text).sample.square().sum().backward()
    close(weight.grad, other.grad)
    weight.grad = None
    weight.requires_grad_(False)


def test_autoencoder_equals_diffusers_conversion(checkpoint, inputs):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = load_vae(checkpoint, "first_stage_model.", dtype=torch.float32, device="cpu")
    assert vae.config.use_quant_conv
    theirs = AutoencoderKL.from_config(dict(vae.config))
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(inputs.model("sd15")), dict(vae.config)))
    images = torch.rand(1, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        close(encode_mode(vae, images), theirs.encode(images).latent_dist.mean)
    close(*gradients_of(vae, theirs, lambda module: module.encode(images).latent_dist.mean, "encoder.conv_in.weight"))


def test_text_encoder_equals_transformers(checkpoint, inputs):
    from transformers import CLIPTextConfig, CLIPTextModel

    encoder = load_clip_text(checkpoint, "cond_stage_model.transformer.", need=Need())
    config = CLIPTextConfig(
        vocab_size=914,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=1,
        hidden_act="quick_gelu",
    )
    theirs = CLIPTextModel(config).eval()
    state = part(inputs.model("sd15"), "cond_stage_model.transformer.text_model.")
    theirs.load_state_dict({key: value for key, value in state.items() if key in theirs.state_dict()})
    ids = torch.randint(0, 900, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(encoder(ids).last_hidden_state, theirs(ids).last_hidden_state)
    name = "encoder.layers.3.mlp.fc1.weight"
    close(*gradients_of(encoder, theirs, lambda module: module(ids).last_hidden_state, name))


def test_text_encoder_of_version_2_equals_transformers(inputs):
    """OpenCLIP's tower without its last block, against diffusers' conversion."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    options = make_options("sd", "network", {"pretrained_model_name_or_path": inputs.model("sd21")})
    (encoder,) = sd_utils.load_components(options, Need(denoiser=False, vae=False)).text_encoders
    config = CLIPTextConfig(
        vocab_size=914,
        hidden_size=64,
        intermediate_size=encoder.config.intermediate_size,
        num_hidden_layers=23,
        num_attention_heads=1,
        hidden_act="gelu",
    )
    theirs = CLIPTextModel(config).eval()
    state = convert_open_clip_checkpoint(theirs, load_file(inputs.model("sd21")), prefix="cond_stage_model.model.")
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    theirs.load_state_dict({key: tensor for key, tensor in bare.items() if key in theirs.state_dict()})
    ids = torch.randint(0, 900, (2, 77), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(encoder(ids).last_hidden_state, theirs(ids).last_hidden_state)
    name = "encoder.layers.3.mlp.fc1.weight"
    close(*gradients_of(encoder, theirs, lambda module: module(ids).last_hidden_state, name))


def test_noise_process_is_diffusers_scheduler():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.allclose(alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-6)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    times = torch.tensor([0, 500, 999])
    ours = Ddpm().mix(latents, noise, times.float(), None)
    assert torch.allclose(ours, scheduler.add_noise(latents, noise, times), atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_discrete_sigmas_are_diffusers_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    assert torch.allclose(discrete_sigmas(shift), scheduler.sigmas[:1000].float(), atol=1e-6)
