"""FLUX.1: our transformer, the autoencoder and the text encoders against diffusers and transformers."""

import dataclasses

import pytest
import torch
from support.diffusers_layout import to_diffusers
from support.gradients import gradients_of

from library import flux_utils
from library.base.safetensors_io import TensorFile, load_file
from library.flux_models import Flux, FluxParams, image_ids, pack_latents, unpack_latents
from library.modules.clip import load_clip_text
from library.modules.components import Need
from library.modules.t5 import load_t5_encoder
from library.modules.vae import decode, encode_mode, load_vae

pytestmark = pytest.mark.parity


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
    model.load_state_dict(to_diffusers(ours.state_dict(), flux_utils.DIFFUSERS_LAYERS))
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


@pytest.fixture(scope="module")
def chroma(inputs):
    file, prefix = flux_utils.open_transformer(inputs.model("chroma"))
    return flux_utils.load_transformer(file, prefix, Need())


def diffusers_chroma(ours):
    from diffusers import ChromaTransformer2DModel

    p = ours.params
    approximator = ours.distilled_guidance_layer
    model = ChromaTransformer2DModel(
        in_channels=p.in_channels,
        num_layers=p.depth,
        num_single_layers=p.depth_single_blocks,
        attention_head_dim=p.hidden_size // p.num_heads,
        num_attention_heads=p.num_heads,
        joint_attention_dim=p.context_in_dim,
        axes_dims_rope=p.axes_dim,
        approximator_num_channels=approximator.in_proj.in_features,
        approximator_hidden_dim=approximator.in_proj.out_features,
        approximator_layers=len(approximator.layers),
    )
    model.load_state_dict(to_diffusers(ours.state_dict(), flux_utils.DIFFUSERS_LAYERS))
    for norm in model.distilled_guidance_layer.norms:
        norm.eps = 1e-6  # diffusers leaves it at the format's own epsilon
    return model.eval()


def call_diffusers_chroma(model, given, mask):
    seen = torch.arange(mask.shape[1])[None] <= mask.sum(dim=1, keepdim=True)
    image = torch.ones(given["img"].shape[:2], dtype=torch.bool)
    return model(
        hidden_states=given["img"],
        img_ids=given["img_ids"][0],
        encoder_hidden_states=given["txt"],
        txt_ids=given["txt_ids"][0],
        timestep=given["times"],
        attention_mask=torch.cat((seen, image), dim=1),
        return_dict=False,
    )[0]


def test_chroma_equals_diffusers(chroma):
    """Of each text's padding one token is seen; forward and one gradient."""
    theirs, given = diffusers_chroma(chroma), random_inputs(chroma.params) | {"guidance": torch.zeros(2)}
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    weight = chroma.single_blocks[0].linear1.weight.requires_grad_()
    other = theirs.requires_grad_(False).single_transformer_blocks[0].proj_mlp.weight.requires_grad_()
    ours, reference = chroma(**given, txt_mask=mask), call_diffusers_chroma(theirs, given, mask)
    close(ours, reference)
    target = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * target).sum().backward()
    (reference * target).sum().backward()
    close(weight.grad[-other.shape[0] :], other.grad)
    weight.requires_grad_(False).grad = None


def test_chroma_reads_guidance_and_one_padding_token(chroma):
    given = random_inputs(chroma.params) | {"guidance": torch.zeros(2)}
    mask = torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
    plain = chroma(**given, txt_mask=mask)
    assert not torch.allclose(plain, chroma(**given | {"guidance": torch.full((2,), 3.5)}, txt_mask=mask), atol=1e-2)
    other = given["txt"].clone()
    other[1, 4:] = 5.0
    assert torch.equal(plain, chroma(**given | {"txt": other}, txt_mask=mask))
    other[1, 3] = 5.0
    assert not torch.allclose(plain[1], chroma(**given | {"txt": other}, txt_mask=mask)[1], atol=1e-3)


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
    close(*gradients_of(vae, theirs, lambda module: module.encode(images).latent_dist.mean, "encoder.conv_in.weight"))


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
    name = "encoder.layers.3.mlp.fc1.weight"
    close(*gradients_of(encoder, theirs.text_model, lambda module: module(ids).last_hidden_state, name))


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
    name = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    close(*gradients_of(encoder, theirs, lambda module: module(ids).last_hidden_state, name))
