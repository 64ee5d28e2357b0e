"""FLUX.1: our transformer, the autoencoder and the text encoders against diffusers and transformers."""

import dataclasses
import re

import pytest
import torch

from library import flux_utils
from library.base.safetensors_io import TensorFile, load_file
from library.flux_models import Flux, FluxParams, image_ids, pack_latents, unpack_latents
from library.modules.clip import load_clip_text
from library.modules.components import Need
from library.modules.t5 import load_t5_encoder
from library.modules.vae import decode, encode_mode, load_vae

pytestmark = pytest.mark.parity


def swapped(tensor):
    first, second = tensor.chunk(2)
    return torch.cat((second, first))


def to_diffusers(state, hidden):
    """Our (published) names to diffusers' names."""
    result = {}
    top = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    double = {
        "img_mod.lin": "norm1.linear",
        "txt_mod.lin": "norm1_context.linear",
        "img_attn.proj": "attn.to_out.0",
        "txt_attn.proj": "attn.to_add_out",
        "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2",
        "txt_mlp.0": "ff_context.net.0.proj",
        "txt_mlp.2": "ff_context.net.2",
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    }
    split = {
        "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    single = {
        "modulation.lin": "norm.linear",
        "linear2": "proj_out",
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    }
    for name, tensor in state.items():
        module, leaf = name.rsplit(".", 1)
        leaf = "weight" if leaf == "scale" else leaf
        if match := re.match(r"double_blocks\.(\d+)\.(.*)", module):
            prefix = f"transformer_blocks.{match[1]}."
            if match[2] in split:
                for part, chunk in zip(split[match[2]], tensor.chunk(3)):
                    result[f"{prefix}{part}.{leaf}"] = chunk
            else:
                result[f"{prefix}{double[match[2]]}.{leaf}"] = tensor
        elif match := re.match(r"single_blocks\.(\d+)\.(.*)", module):
            prefix = f"single_transformer_blocks.{match[1]}."
            if match[2] == "linear1":
                sizes = [hidden] * 3 + [tensor.shape[0] - 3 * hidden]
                for part, chunk in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), tensor.split(sizes)):
                    result[f"{prefix}{part}.{leaf}"] = chunk
            else:
                result[f"{prefix}{single[match[2]]}.{leaf}"] = tensor
        else:
            value = swapped(tensor) if module == "final_layer.adaLN_modulation.1" else tensor
            result[f"{top[module]}.{leaf}"] = value
    return result


def diffusers_model(ours: Flux):
    from diffusers import FluxTransformer2DModel

    p = ours.params
    model = FluxTransformer2DModel(
        in_channels=p.in_channels,
        num_layers=p.depth,
        num_single_layers=p.depth_single_blocks,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_attention_heads=p.num_heads,
        joint_attention_dim=p.context_in_dim,
        pooled_projection_dim=p.vec_in_dim,
        guidance_embeds=p.guidance_embed,
        axes_dims_rope=p.axes_dim,
    )
    model.load_state_dict(to_diffusers(ours.state_dict(), p.hidden_size))
    return model.eval()


def random_inputs(params: FluxParams, height=6, width=4, tokens=7):
    generator = torch.Generator().manual_seed(1)
    channels = params.in_channels // 4
    latents = torch.randn(2, channels, height, width, generator=generator)
    return {
        "img": pack_latents(latents),
        "img_ids": image_ids(2, height, width, "cpu"),
        "txt": torch.randn(2, tokens, params.context_in_dim, generator=generator),
        "txt_ids": torch.zeros(2, tokens, 3),
        "times": torch.tensor([0.9, 0.31]),
        "pooled": torch.randn(2, params.vec_in_dim, generator=generator),
        "guidance": torch.tensor([3.5, 1.0]),
    }


def call_diffusers(model, given, mask=None):
    extra = {}
    if mask is not None:
        image = torch.ones(given["img"].shape[:2], dtype=torch.bool)
        extra = {"joint_attention_kwargs": {"attention_mask": torch.cat((mask, image), 1)[:, None, None]}}
    return model(
        hidden_states=given["img"],
        img_ids=given["img_ids"][0],
        encoder_hidden_states=given["txt"],
        txt_ids=given["txt_ids"][0],
        timestep=given["times"],
        pooled_projections=given["pooled"],
        guidance=given["guidance"] if model.config.guidance_embeds else None,
        return_dict=False,
        **extra,
    )[0]


@pytest.fixture(scope="module")
def transformer(inputs):
    file, prefix = flux_utils.open_transformer(inputs.model("flux1_dev"))
    return flux_utils.load_transformer(file, prefix, Need())


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer_equals_diffusers(transformer, guided, masked):
    ours = transformer
    if not guided:
        ours = Flux(dataclasses.replace(transformer.params, guidance_embed=False))
        ours.load_state_dict({k: v for k, v in transformer.state_dict().items() if not k.startswith("guidance_in")})
    theirs, given = diffusers_model(ours), random_inputs(ours.params)
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4]).bool() if masked else None
    close(ours(**given, txt_mask=mask), call_diffusers(theirs, given, mask))


def test_gradients_equal_diffusers(transformer):
    theirs, given = diffusers_model(transformer), random_inputs(transformer.params)
    target = torch.randn(given["img"].shape, generator=torch.Generator().manual_seed(2))
    weight = transformer.double_blocks[0].img_mlp[0].weight.requires_grad_()
    other = theirs.requires_grad_(False).transformer_blocks[0].ff.net[0].proj.weight.requires_grad_()
    (transformer(**given) * target).sum().backward()
    (call_diffusers(theirs, given) * target).sum().backward()
    close(weight.grad, other.grad)
    weight.grad = None
    weight.requires_grad_(False)


def test_packing_round_trip():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpack_latents(pack_latents(latents), 6, 10), latents)


def test_packing_is_diffusers():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack_latents(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))


def test_autoencoder_equals_diffusers(inputs):
    """Built from the published file, against diffusers' own converter of published files."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = load_vae(TensorFile(inputs.model("ae")), "", dtype=torch.float32, device="cpu")
    assert not vae.config.use_quant_conv and vae.config.latent_channels == 16
    theirs = AutoencoderKL.from_config(dict(vae.config))
    theirs.load_state_dict(convert_ldm_vae_checkpoint(load_file(inputs.model("ae")), dict(vae.config)))
    images = torch.rand(1, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(images).latent_dist.mean
        close(encode_mode(vae, images), latents)
        close(decode(vae, latents), theirs.decode(latents).sample.clamp(-1, 1))


def test_clip_equals_transformers(inputs):
    """The pooled state against transformers' projection-free tower, loaded by its own names."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder = load_clip_text(TensorFile(inputs.model("clip_l")), "", need=Need())
    state = load_file(inputs.model("clip_l"))
    config = CLIPTextConfig(
        vocab_size=914,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=1,
        projection_dim=64,
        hidden_act="quick_gelu",
        eos_token_id=2,
    )
    theirs = CLIPTextModelWithProjection(config).eval()
    known = theirs.state_dict()
    missing, _ = theirs.load_state_dict({k: v for k, v in state.items() if k in known}, strict=False)
    assert set(missing) <= {"text_projection.weight"}
    ids = torch.tensor([[912, 5, 6, 913] + [913] * 73])
    with torch.no_grad():
        ours, other = encoder(ids), theirs.text_model(ids)
    close(ours.pooler_output, other.pooler_output)
    close(ours.last_hidden_state, other.last_hidden_state)


def test_t5_equals_transformers(inputs):
    from transformers import T5Config, T5EncoderModel

    encoder = load_t5_encoder(TensorFile(inputs.model("t5xxl")), need=Need())
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight
    config = T5Config(
        vocab_size=encoder.config.vocab_size,
        d_model=256,
        d_kv=16,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    theirs = T5EncoderModel(config).eval()
    theirs.load_state_dict(load_file(inputs.model("t5xxl")), strict=False)
    theirs.encoder.embed_tokens.weight = theirs.shared.weight
    ids = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 11, [1] * 4 + [0] * 7])
    with torch.no_grad():
        for seen in (None, mask):
            ours, other = encoder(ids, attention_mask=seen), theirs(ids, attention_mask=seen)
            close(ours.last_hidden_state, other.last_hidden_state)
