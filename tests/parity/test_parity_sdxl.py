"""SDXL: what we load and how it is called, against diffusers and transformers."""

import pytest
import torch
from support.gradients import gradients_of
from support.runs import MODEL_FLAGS, MORE_FLAGS

from library import sdxl_utils
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.diffusion.ddpm import Ddpm
from library.modules.clip import load_projected_open_clip_text
from library.modules.components import Need
from library.modules.vae import encode_mode, load_vae
from library.strategy_base import Strategies
from library.strategy_sdxl import SCALE, SdxlConditioning, SdxlDenoisingStrategy, build_strategies
from library.strategy_unet import ImageSizes
from library.train_util import make_options

pytestmark = pytest.mark.parity


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def part(path, prefix):
    return {key.removeprefix(prefix): value for key, value in load_file(path).items() if key.startswith(prefix)}


def options(inputs, **values):
    (flag,) = MODEL_FLAGS["sdxl"]
    assert not MORE_FLAGS.get("sdxl")
    return make_options(
        "sdxl",
        "network",
        {
            flag.removeprefix("--"): inputs.model("sdxl"),
            "tokenizer_cache_dir": str(inputs.folder / "tokenizers"),
            **values,
        },
    )


def strategies(inputs, **values) -> Strategies:
    given = options(inputs, **values)
    return build_strategies(given, sdxl_utils.inspect(given))


@pytest.fixture(scope="module")
def checkpoint(inputs):
    return sdxl_utils.open_checkpoint(inputs.model("sdxl"))


@pytest.fixture(scope="module")
def unet(checkpoint):
    return sdxl_utils.load_unet(checkpoint, Need())


def test_denoising_equals_diffusers(unet, inputs):
    """Names, sizes, heads, and the order of the size conditioning."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    theirs = UNet2DConditionModel(
        block_out_channels=(32, 64, 128),
        cross_attention_dim=192,
        attention_head_dim=(1, 1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 1),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1536 + 128,
    ).eval()
    config = {**theirs.config, "class_embed_type": None}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(load_file(inputs.model("sdxl")), config))
    generator = torch.Generator().manual_seed(0)
    noisy, pooled = torch.randn(2, 4, 16, 24, generator=generator), torch.randn(2, 128, generator=generator)
    first, second = (torch.randn(2, 77, width, generator=generator) for width in (64, 128))
    times = torch.tensor([17, 801])
    ids = torch.tensor([[200, 300, 8, 16, 128, 192], [640, 480, 0, 0, 128, 192]])
    sizes = ImageSizes(ids[:, :2], ids[:, 2:4], ids[:, 4:])
    denoising = SdxlDenoisingStrategy(Ddpm(), SCALE)
    given = SdxlConditioning(hidden_state1=first, hidden_state2=second, pool2=pooled)

    def ours():
        return denoising.call(unet, noisy, times.float(), given, sizes)

    def reference():
        added = {"text_embeds": pooled, "time_ids": ids}
        return theirs(noisy, times, torch.cat((first, second), dim=-1), added_cond_kwargs=added).sample

    with torch.no_grad():
        close(ours(), reference())
    weight = unet.mid_block.attentions[0].proj_in.weight.requires_grad_()
    other = theirs.requires_grad_(False).mid_block.attentions[0].proj_in.weight.requires_grad_()
    ours().square().sum().backward()
    reference().square().sum().backward()
    close(weight.grad, other.grad)
    weight.grad = None
    weight.requires_grad_(False)


def test_autoencoder_equals_diffusers_conversion(checkpoint, inputs):
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = load_vae(checkpoint, "first_stage_model.", dtype=torch.float32, device="cpu")
    theirs = AutoencoderKL.from_config(dict(vae.config))
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(inputs.model("sdxl")), dict(vae.config)))
    images = torch.rand(1, 3, 48, 64) * 2 - 1
    with torch.no_grad():
        close(encode_mode(vae, images), theirs.encode(images).latent_dist.mean)
    close(*gradients_of(vae, theirs, lambda module: module.encode(images).latent_dist.mean, "encoder.conv_in.weight"))


def other_projection(inputs, tmp_path, name):
    """The checkpoint with a projection that is not its own transposed, under one of its two names."""
    tensors = load_file(inputs.model("sdxl"))
    stored = "conditioner.embedders.1.model.text_projection"
    matrix = torch.randn(128, 128, generator=torch.Generator().manual_seed(3)) * 0.1
    del tensors[stored]
    tensors[stored.replace("text_projection", name)] = matrix
    save_file_atomic(tensors, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors", matrix


@pytest.mark.parametrize("name", ["text_projection", "text_projection.weight"])
def test_text_encoders_equal_transformers(inputs, tmp_path, name):
    """OpenCLIP's projection is transposed where it has OpenCLIP's name; the pooled state is the first end of text's."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    path, matrix = other_projection(inputs, tmp_path, name)
    prefix = "conditioner.embedders.1.model."
    encoder = load_projected_open_clip_text(TensorFile(path), prefix, need=Need(), part="bigG")
    config = CLIPTextConfig(
        vocab_size=914,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=128,
        hidden_act="gelu",
        bos_token_id=912,
        eos_token_id=913,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    stored = {**load_file(path), f"{prefix}text_projection": matrix if name == "text_projection" else matrix.T}
    state = convert_open_clip_checkpoint(theirs, stored, prefix=prefix)
    theirs.load_state_dict({key: value for key, value in state.items() if "position_ids" not in key})
    made = strategies(inputs)
    first = sdxl_utils.load_text_encoders(TensorFile(inputs.model("sdxl")), Need())[0]
    tokens = made.tokenize.tokenize(["a cat on a sofa", "temple, blue sky"])
    weight = encoder.text_projection.weight.requires_grad_()
    other = theirs.requires_grad_(False).text_projection.weight.requires_grad_()
    found = made.text_encoding.encode_tokens(tokens, [first, encoder])
    expected = theirs(tokens[1][:, 0], output_hidden_states=True)
    close(found.hidden_state2, expected.hidden_states[-2])
    close(found.pool2, expected.text_embeds)
    found.pool2.square().sum().backward()
    expected.text_embeds.square().sum().backward()
    close(weight.grad, other.grad)


def test_long_captions_are_pooled_in_their_first_window(inputs):
    """And an id beyond the end of text is not taken for the end."""
    encoders = sdxl_utils.load_text_encoders(TensorFile(inputs.model("sdxl")), Need())
    text = ", ".join(["a cat on a sofa beside a temple"] * 12)
    made = strategies(inputs, max_token_length=150)
    with torch.no_grad():
        long = made.text_encoding.encode_tokens(made.tokenize.tokenize([text, "a cat"]), encoders)
        short = strategies(inputs).tokenize.tokenize([text, "a cat"])
        expected = made.text_encoding.encode_tokens(short, encoders)
    assert long.hidden_state1.shape == (2, 152, 64) and long.hidden_state2.shape == (2, 152, 128)
    assert torch.equal(long.pool2, expected.pool2)
    assert torch.equal(long.hidden_state2[:, :76], expected.hidden_state2[:, :76])
