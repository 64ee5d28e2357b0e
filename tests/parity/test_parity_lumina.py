"""Lumina Image 2.0: our transformer and the text encoder against diffusers and transformers."""

import pytest
import torch
from support.runs import dataset_toml, network_arguments, run_training

from library.base.safetensors_io import TensorFile, load_file
from library.lumina_models import NextDiT, patches, unpatched
from library.lumina_utils import DIFFUSERS_LAYERS, load_transformer, open_transformer
from library.modules.components import Need
from library.modules.gemma2 import load_gemma2
from library.modules.layer_names import find_rule
from networks.lora_lumina import create_network_from_weights

pytestmark = pytest.mark.parity

# normalisations, which carry no adapters and so have no rule
NORMS = {
    "attention_norm2": "norm2",
    "ffn_norm1": "ffn_norm1",
    "ffn_norm2": "ffn_norm2",
    "attention.q_norm": "attn.norm_q",
    "attention.k_norm": "attn.norm_k",
}


def norm_name(path):
    if path == "cap_embedder.0":
        return "time_caption_embed.caption_embedder.0"
    stack, number, inner = path.split(".", 2)
    if inner == "attention_norm1":
        inner = "norm1" if stack == "context_refiner" else "norm1.norm"
    return f"{stack}.{number}.{NORMS.get(inner, inner)}"


def to_diffusers(state):
    """Our (published) names to diffusers' names."""
    result = {}
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        found = find_rule(DIFFUSERS_LAYERS, path)
        if found is not None:
            rule, names = found
            parts = [tensor] if len(names) == 1 else tensor.split(rule.parts(tensor.shape[1], tensor.shape[0]))
            result |= {f"{theirs}.{leaf}": part for theirs, part in zip(names, parts, strict=True)}
        elif path != "norm_final":
            result[f"{norm_name(path)}.{leaf}"] = tensor
    return result


def diffusers_model(ours: NextDiT, eps=1e-6):
    """Their class has no setting for the eps of queries and keys."""
    from diffusers import Lumina2Transformer2DModel

    p = ours.params
    model = Lumina2Transformer2DModel(
        in_channels=p.in_channels,
        hidden_size=p.hidden_size,
        num_layers=p.num_layers,
        num_refiner_layers=p.num_refiner_layers,
        num_attention_heads=p.num_heads,
        num_kv_heads=p.num_kv_heads,
        axes_dim_rope=p.axes_dim,
        axes_lens=(64, 64, 64),
        cap_feat_dim=p.cap_feat_dim,
    )
    model.load_state_dict(to_diffusers(ours.state_dict()))
    for module in model.modules():
        if hasattr(module, "norm_q"):
            module.norm_q.eps = module.norm_k.eps = eps
    return model.eval()


@pytest.fixture(scope="module")
def transformer(inputs):
    return load_transformer(*open_transformer(inputs.model("lumina2")), Need())


def given(params, height=6, width=10, tokens=9):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, params.in_channels, height, width, generator=generator)
    text = torch.randn(2, tokens, params.cap_feat_dim, generator=generator)
    return latents, torch.tensor([0.1, 0.69]), text


def call_diffusers(model, latents, times, text, mask=None):
    mask = torch.ones(text.shape[:2], dtype=torch.bool) if mask is None else mask
    return model(
        hidden_states=latents,
        timestep=times,
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        return_dict=False,
    )[0]


def close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


MASK = torch.tensor([[1] * 9, [1] * 4 + [0] * 5]).bool()


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "masked"])
def test_transformer_equals_diffusers(transformer, mask):
    arguments = given(transformer.params)
    with torch.no_grad():
        close(transformer(*arguments, mask), call_diffusers(diffusers_model(transformer), *arguments, mask))


def test_gradients_equal_diffusers(transformer):
    latents, times, text = given(transformer.params)
    theirs = diffusers_model(transformer).requires_grad_(False)
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    weight = transformer.context_refiner[0].feed_forward.w1.weight.requires_grad_()
    other = theirs.context_refiner[0].feed_forward.linear_1.weight.requires_grad_()
    (transformer(latents, times, text, MASK) * target).sum().backward()
    (call_diffusers(theirs, latents, times, text, MASK) * target).sum().backward()
    close(weight.grad, other.grad)
    weight.grad = None
    weight.requires_grad_(False)


def test_the_eps_of_queries_and_keys(transformer):
    """Small queries and keys tell 1e-6 from 1e-5, which is that of the blocks."""
    small = NextDiT(transformer.params).eval()
    small.load_state_dict(
        {name: t * 1e-2 if name.endswith("attention.qkv.weight") else t for name, t in transformer.state_dict().items()}
    )
    arguments = given(small.params)
    with torch.no_grad():
        ours = small(*arguments, MASK)
        close(ours, call_diffusers(diffusers_model(small), *arguments, MASK))
        other = call_diffusers(diffusers_model(small, eps=1e-5), *arguments, MASK)
    assert (ours - other).abs().max() > 1e-4 * ours.abs().max()


def test_masked_text_is_as_if_it_were_not_there(transformer):
    """In the middle of a batch, too: text that is not valid moves neither positions nor sums."""
    latents, times, text = given(transformer.params)
    with torch.no_grad():
        both = transformer(latents, times, text, MASK)
        other = transformer(latents, times, text.where(MASK[..., None], torch.tensor(5.0)), MASK)
        alone = transformer(latents[1:], times[1:], text[1:, :4])
    assert torch.equal(both, other)
    close(both[1:], alone)


def test_more_than_300_tokens(transformer):
    """The reference's table of rotations ends there."""
    latents, times, _ = given(transformer.params)
    text = torch.randn(2, 310, transformer.params.cap_feat_dim, generator=torch.Generator().manual_seed(3))
    theirs = diffusers_model(transformer)
    theirs.rope_embedder.axes_lens = (400, 64, 64)
    theirs.rope_embedder.freqs_cis = theirs.rope_embedder._precompute_freqs_cis(
        theirs.rope_embedder.axes_dim, (400, 64, 64), theirs.rope_embedder.theta
    )
    with torch.no_grad():
        close(transformer(latents, times, text), call_diffusers(theirs, latents, times, text))


def test_patches_round_trip():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(unpatched(patches(latents), 6, 10), latents)
    assert torch.equal(patches(latents)[0, 6, :16], latents[0, :, 2, 2])  # second row of five patches: channels first


def gemma_by_itself(path, attention="eager"):
    """transformers' model, loaded by its own names and sizes given by hand."""
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=548,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        attn_implementation=attention,
    )
    model = Gemma2Model(config).eval()
    model.load_state_dict(load_file(path))
    return model


IDS = torch.tensor([[2, 5, 6, 77, 301, 9], [2, 8, 14, 0, 0, 0]])
SEEN = (IDS != 0).long()


def states(model):
    with torch.no_grad():
        return model(IDS, attention_mask=SEEN, output_hidden_states=True, use_cache=False).hidden_states


def test_gemma_equals_transformers(inputs):
    ours = states(load_gemma2(TensorFile(inputs.model("gemma2_2b")), need=Need()))
    theirs = states(gemma_by_itself(inputs.model("gemma2_2b")))
    assert len(ours) == 4
    for one, other in zip(ours, theirs, strict=True):
        close(one, other)


def test_attention_logits_are_capped(inputs):
    """50 * tanh(x / 50), written out: queries twelve times as large come near it."""
    model = load_gemma2(TensorFile(inputs.model("gemma2_2b")), need=Need())
    attention = model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight *= 12
        x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(4))
        still = torch.ones(1, 5, 256), torch.zeros(1, 5, 256)  # no rotation
        q = attention.q_proj(x).unflatten(-1, (2, 256)).transpose(1, 2)
        k = attention.k_proj(x).unflatten(-1, (1, 256)).transpose(1, 2)
        v = attention.v_proj(x).unflatten(-1, (1, 256)).transpose(1, 2)
        logits = q @ k.mT / 16
        assert logits.abs().max() > 25
        joined = ((50 * torch.tanh(logits / 50)).softmax(-1) @ v).transpose(1, 2).flatten(2)
        found = attention(x, position_embeddings=still, attention_mask=None)[0]
        close(found, attention.o_proj(joined))
        uncapped = attention.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert (found - uncapped).abs().max() > 1e-3 * found.abs().max()


def test_gradients_of_gemma_equal_transformers(inputs):
    target = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(5))
    found = []
    for model in (
        load_gemma2(TensorFile(inputs.model("gemma2_2b")), need=Need()),
        gemma_by_itself(inputs.model("gemma2_2b")).requires_grad_(False),
    ):
        weight = model.layers[0].self_attn.k_proj.weight.requires_grad_()
        state = model(IDS, attention_mask=SEEN, output_hidden_states=True, use_cache=False).hidden_states[-2]
        (state * target * SEEN[..., None]).sum().backward()
        found.append(weight.grad)
    close(*found)


def test_adapters_for_diffusers_and_comfy(inputs, tmp_path):
    """What --save_also_as writes, in diffusers' own loader: the change is the one of our forward."""
    from diffusers import Lumina2Pipeline

    more = ("--save_also_as", "comfy,diffusers", "--learning_rate", "2e-2", "--network_args", "embedder_dims=2,2,2")
    run_training("lumina", network_arguments("lumina", inputs, tmp_path, dataset_toml(tmp_path, inputs), *more))
    ours = load_transformer(*open_transformer(inputs.model("lumina2")), Need())
    arguments = given(ours.params)
    with torch.no_grad():
        plain = ours(*arguments, MASK)
    empty = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer"))
    pipeline = Lumina2Pipeline(**empty, transformer=diffusers_model(ours))
    pipeline.load_lora_weights(str(tmp_path / "out"), weight_name="last-diffusers.safetensors")
    file = str(tmp_path / "out" / "last.safetensors")
    network, weights = create_network_from_weights(1.0, file, None, [None], ours)
    network.apply_to([None], ours, False, True)
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name.startswith("lora_unet")})
    with torch.no_grad():
        changed, theirs = ours(*arguments, MASK), call_diffusers(pipeline.transformer, *arguments, MASK)
    assert (changed - plain).abs().max() > 1e-2 * plain.abs().max()
    assert (changed - theirs).abs().max() <= 1e-4 * changed.abs().max()
    names = set(load_file(tmp_path / "out" / "last-comfy.safetensors"))
    assert "diffusion_model.layers.0.attention.qkv.lora_A.weight" in names
    assert "text_encoders.gemma2_2b.transformer.model.layers.0.self_attn.q_proj.lora_B.weight" in names
