"""HunyuanImage 2.1: transformer, VAE and text encoders against diffusers and transformers."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from support import diffusers_models
from support.gradients import gradients_of
from support.runs import GOLDEN

from library import hunyuan_image_utils
from library.base.safetensors_io import TensorFile, load_file
from library.hunyuan_image_models import HunyuanImage, HunyuanImageParams
from library.hunyuan_image_vae import load_vae, vae_config, vae_names
from library.modules.components import Need
from library.modules.qwen25_vl import load_qwen25_vl_text, qwen25_vl_config, qwen25_vl_names
from library.modules.t5 import load_t5_encoder
from library.modules.vae import decode, encode_mode

pytestmark = pytest.mark.parity
PARAMS = HunyuanImageParams(
    in_channels=8,
    out_channels=8,
    hidden_size=64,
    num_heads=2,
    mlp_size=256,
    depth=2,
    single_depth=2,
    refiner_depth=2,
    text_size=48,
    glyph_size=40,
    glyph_hidden=(56, 56),
    axes_dim=(16, 16),
)


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def transformers_pair():
    """Ours with random weights, and diffusers' with the same."""
    torch.manual_seed(0)
    ours = HunyuanImage(PARAMS).eval()
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            scale = 0.3 if tensor.ndim != 2 else tensor.shape[1] ** -0.5
            tensor.copy_(torch.randn(tensor.shape) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
    return ours.requires_grad_(False), diffusers_models.hunyuan_image(ours)


def given(quoting=True):
    generator = torch.Generator().manual_seed(1)
    glyphs = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]) if quoting else torch.zeros(2, 4, dtype=torch.int64)
    return {
        "latents": torch.randn(2, 8, 6, 4, generator=generator),
        "timesteps": torch.tensor([901.0, 17.0]),
        "text": torch.randn(2, 7, 48, generator=generator),
        "text_mask": torch.tensor([[1] * 7, [1] * 3 + [0] * 4]),
        "glyphs": torch.randn(2, 4, 40, generator=generator),
        "glyph_mask": glyphs,
    }


@pytest.mark.parametrize("quoting", [True, False])
def test_transformer_equals_diffusers(transformers_pair, quoting):
    """Forward and one gradient, with padding among the text."""
    ours, theirs = transformers_pair
    inputs = given(quoting)
    weight = ours.double_blocks[0].txt_mlp.fc1.weight.requires_grad_()
    other = theirs.transformer_blocks[0].ff_context.net[0].proj.weight.requires_grad_()
    mine = ours(**inputs)
    reference = diffusers_models.call_hunyuan_image(theirs, inputs)
    close(mine, reference)
    target = torch.randn(mine.shape, generator=torch.Generator().manual_seed(2))
    (mine * target).sum().backward()
    (reference * target).sum().backward()
    close(weight.grad, other.grad)
    weight.grad = other.grad = None


def test_padding_is_not_attended_to(transformers_pair):
    ours, _ = transformers_pair
    inputs = given()
    plain = ours(**inputs)
    text, glyphs = inputs["text"].clone(), inputs["glyphs"].clone()
    text[1, 3:], glyphs[1, 1:] = 9.0, 9.0
    close(ours(**inputs | {"text": text, "glyphs": glyphs}), plain)


def test_every_name_and_shape_of_the_published_transformer():
    keys = json.loads((GOLDEN / "keys" / "hunyuan_image_transformer.json").read_text())
    file = SimpleNamespace(shapes=keys, path="published", metadata={})
    params = hunyuan_image_utils.hunyuan_image_params(file, "")
    with torch.device("meta"):
        model = HunyuanImage(params)
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == keys
    assert (params.num_heads, params.axes_dim) == (28, (64, 64))


def test_every_name_and_shape_of_the_published_vae():
    from diffusers import AutoencoderKLHunyuanImage

    keys = json.loads((GOLDEN / "keys" / "hunyuan_image_vae.json").read_text())
    names = vae_names(keys)
    with torch.device("meta"):
        vae = AutoencoderKLHunyuanImage(**vae_config(keys))
    found = {names[key]: list(tensor.shape) for key, tensor in vae.state_dict().items()}
    assert found == keys


def test_every_name_and_shape_of_the_published_text_encoder():
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    keys = json.loads((GOLDEN / "keys" / "hunyuan_image_qwen2_5_vl_text.json").read_text())
    more = {"visual.patch_embed.proj.weight": [1], "lm_head.weight": [1]}
    names = qwen25_vl_names(type("File", (dict,), {"names": [*keys, *more]})({**keys, **more}))
    sizes = qwen25_vl_config({ours: keys[stored] for ours, stored in names.items()})
    turning = {**sizes.pop("rope_scaling"), "rope_theta": sizes.pop("rope_theta")}
    with torch.device("meta"):
        model = Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**sizes, rope_parameters=turning))
    assert {names[key]: list(tensor.shape) for key, tensor in model.state_dict().items()} == keys
    assert (sizes["num_attention_heads"], sizes["num_key_value_heads"]) == (28, 4)


@pytest.mark.parametrize("rows", [None, 5])
def test_autoencoder_equals_diffusers(inputs, rows):
    """Also in bands of rows that do not divide the image."""
    from diffusers import AutoencoderKLHunyuanImage

    file = TensorFile(inputs.model("hunyuan_image_vae"))
    vae = load_vae(file, Need(), rows)
    theirs = AutoencoderKLHunyuanImage(**vae_config(file.shapes)).eval()
    names = vae_names(file.names)
    theirs.load_state_dict({ours: file.tensor(stored) for ours, stored in names.items()})
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = vae.encoder.conv_in.weight.requires_grad_()
    other = theirs.requires_grad_(False).encoder.conv_in.weight.requires_grad_()
    latents, reference = encode_mode(vae, images), theirs.encode(images).latent_dist.mode()
    close(latents, reference)
    latents.square().sum().backward()
    reference.square().sum().backward()
    close(weight.grad, other.grad)
    with torch.no_grad():
        close(decode(vae, latents), theirs.decode(reference).sample.clamp(-1, 1))


def test_text_encoder_equals_transformers(inputs):
    """The language model of the whole vision-language model, which is loaded without the rest."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    path = inputs.model("qwen2_5_vl")
    ours = load_qwen25_vl_text(TensorFile(path), need=Need())
    text = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 128,
        "vocab_size": 559,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"mrope_section": [4, 6, 6], "rope_type": "default", "rope_theta": 1e6},
        "eos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    theirs = Qwen2_5_VLModel(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()
    stored = {key: tensor for key, tensor in load_file(path).items() if key.startswith("model.")}
    theirs.language_model.load_state_dict({key.removeprefix("model."): tensor for key, tensor in stored.items()})
    ids = torch.randint(0, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 40, [1] * 33 + [0] * 7])
    with torch.no_grad():
        mine = ours(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
        reference = theirs(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-3]
    close(mine[0], reference[0])
    close(mine[1, :33], reference[1, :33])
    name = "layers.1.mlp.up_proj.weight"
    close(*gradients_of(ours, theirs.language_model, lambda module: module(ids).last_hidden_state, name))
    assert {type(module).__name__ for module in ours.modules()} & {"Qwen2_5_VLVisionBlock"} == set()


def test_byt5_equals_transformers(inputs):
    from transformers import T5Config, T5EncoderModel

    path = inputs.model("byt5")
    ours = load_t5_encoder(TensorFile(path), need=Need())
    sizes = {"vocab_size": 1510, "d_model": 64, "d_kv": 16, "d_ff": ours.config.d_ff, "num_heads": 2}
    config = T5Config(**sizes, num_layers=ours.config.num_layers, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    theirs = T5EncoderModel(config).eval()
    theirs.load_state_dict(load_file(path), strict=False)
    theirs.encoder.embed_tokens.weight = theirs.shared.weight
    ids, mask = torch.randint(3, 259, (2, 12)), torch.tensor([[1] * 12, [1] * 5 + [0] * 7])
    with torch.no_grad():
        mine = ours(ids, attention_mask=mask.float()).last_hidden_state
        close(mine, theirs(ids, attention_mask=mask).last_hidden_state)
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    close(*gradients_of(ours, theirs, lambda module: module(ids).last_hidden_state, name))


def test_other_rotary_axes_come_from_the_file(inputs, tmp_path):
    from library.base.safetensors_io import save_file_atomic

    tensors = load_file(inputs.model("hunyuan_image"))
    save_file_atomic(tensors, tmp_path / "m.safetensors", {"config": json.dumps({"rope_axes_dim": [12, 20]})})
    file, prefix = hunyuan_image_utils.open_transformer(str(tmp_path / "m.safetensors"))
    params = hunyuan_image_utils.hunyuan_image_params(file, prefix)
    assert params.axes_dim == (12, 20)
    plain = hunyuan_image_utils.hunyuan_image_params(TensorFile(inputs.model("hunyuan_image")), "")
    assert dataclasses.replace(params, axes_dim=(16, 16)) == plain
