"""Anima: our transformer and text adapter, the autoencoder and the text encoder against diffusers and transformers."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from support import diffusers_models
from support.gradients import gradients_of
from support.runs import GOLDEN

from library import anima_utils
from library.anima_models import Anima, AnimaParams
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.modules.components import Need
from library.modules.layer_names import find_rule
from library.modules.llm_adapter import LLMAdapterParams
from library.modules.qwen3 import load_qwen3, open_qwen3
from library.modules.qwen_image_vae import load_qwen_image_vae, vae_config, vae_names

pytestmark = pytest.mark.parity

REAL = AnimaParams(
    16, 16, 2048, 8192, 16, 28, 1024, 256, (1.0, 4.0, 4.0), LLMAdapterParams(1024, 1024, 1024, 4096, 16, 6, 32128)
)


@dataclass
class Header:
    """What of a checkpoint is known without its data."""

    shapes: dict
    path: Path = Path("real.safetensors")
    metadata: dict = field(default_factory=dict)

    @property
    def names(self):
        return list(self.shapes)


def published_keys():
    return {
        name: tuple(shape) for name, shape in json.loads((GOLDEN / "keys/anima_transformer.json").read_text()).items()
    }


def close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def transformer(inputs):
    return anima_utils.load_transformer(anima_utils.open_transformer(inputs.model("anima")), Need())


@pytest.fixture
def theirs(transformer, monkeypatch):
    return diffusers_models.anima(transformer, monkeypatch)


def random_inputs(params):
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(2, 9, params.context_dim, generator=generator)
    context[1, 4:] = 0.0
    return torch.randn(2, 16, 8, 12, generator=generator), torch.tensor([0.9, 0.31]), context


def test_transformer_equals_diffusers(transformer, theirs):
    given = random_inputs(transformer.params)
    close(transformer.denoise(*given), diffusers_models.call_anima(theirs, *given))


def test_gradients_equal_diffusers(transformer, theirs):
    given = random_inputs(transformer.params)
    target = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(2))
    weight = transformer.blocks[0].cross_attn.k_proj.weight.requires_grad_()
    other = theirs.transformer_blocks[0].attn2.to_k.weight.requires_grad_()
    (transformer.denoise(*given) * target).sum().backward()
    (diffusers_models.call_anima(theirs, *given) * target).sum().backward()
    close(weight.grad, other.grad)
    weight.grad = None
    weight.requires_grad_(False)


def test_text_adapter_equals_diffusers(transformer):
    """Masks of both sides included; in the forward of the transformer too."""
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    ours, p = transformer.llm_adapter, transformer.params.adapter
    other = AnimaTextConditioner(p.source_dim, p.target_dim, p.model_dim, p.depth, p.num_heads, 4.0, p.vocab_size)
    other.load_state_dict(ours.state_dict())
    other.register_to_config(min_sequence_length=7)
    generator = torch.Generator().manual_seed(3)
    source, ids = torch.randn(2, 11, p.source_dim, generator=generator), torch.randint(0, 300, (2, 7))
    source_mask = torch.tensor([[1] * 11, [1] * 5 + [0] * 6])
    source = source.masked_fill(~source_mask.bool()[..., None], 0.0)
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7])
    with torch.no_grad():
        states = other(source, ids, mask, source_mask)
        close(ours(source, source_mask, ids, mask), states)
        latents, times, _ = random_inputs(transformer.params)
        whole = transformer(latents, times, source, source_mask, ids, mask)
        close(whole, transformer.denoise(latents, times, states))


def strict_attention(q, k, v, *, mask=None):
    """Attention that gives no numbers where there is nothing to attend to, as some kernels do."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def test_an_empty_text_has_finite_states(transformer, monkeypatch):
    """No token of the language model to attend to: like one whose states are all zeros."""
    for module in transformer.llm_adapter.modules():
        if "attend" in module.__dict__:
            monkeypatch.setattr(module, "attend", strict_attention)
    p = transformer.params.adapter
    source, ids, mask = torch.zeros(1, 6, p.source_dim), torch.tensor([[1, 0, 0]]), torch.tensor([[1, 0, 0]])
    states = transformer.text_states(source, torch.zeros(1, 6, dtype=torch.int64), ids, mask)
    close(states, transformer.text_states(source, torch.ones(1, 6, dtype=torch.int64), ids, mask))
    assert torch.isfinite(states).all() and states[0, 1:].abs().max() == 0 and states[0, 0].abs().max() > 0


def test_real_sizes():
    """Names and shapes of the published file, and sizes read from them."""
    published = published_keys()
    with torch.device("meta"):
        state = {f"net.{name}": tuple(tensor.shape) for name, tensor in Anima(REAL).state_dict().items()}
    assert state == {name: shape for name, shape in published.items() if "pos_embedder" not in name}
    assert anima_utils.anima_params(Header(published)) == REAL
    assert anima_utils.anima_params(Header({name.removeprefix("net."): s for name, s in published.items()})) == REAL


def test_every_layer_has_a_name_in_diffusers():
    with torch.device("meta"):
        model = Anima(REAL)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    lost = [name for name in layers if find_rule(anima_utils.DIFFUSERS_LAYERS, name) is None]
    assert not lost


@pytest.fixture(scope="module")
def vae_pair(inputs):
    """diffusers' own model of the file, and our loader."""
    from diffusers import AutoencoderKLQwenImage

    file = TensorFile(inputs.model("qwen_image_vae"))
    theirs = AutoencoderKLQwenImage(**vae_config(file.shapes)).eval()
    theirs.load_state_dict(load_file(inputs.model("qwen_image_vae")))
    return theirs, lambda **more: load_qwen_image_vae(file, dtype=torch.float32, device="cpu", **more)


@pytest.mark.parametrize(
    "form", [{}, {"frames_cached": False}, {"flat": True}, {"chunk": 5}, {"flat": True, "chunk": 3}], ids=str
)
def test_autoencoder_equals_diffusers(vae_pair, form):
    """In each of its forms; normalised per channel."""
    theirs, load = vae_pair
    vae, images = load(**form), torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(getattr(theirs.config, f"latents_{one}")).view(-1, 1, 1) for one in ("mean", "std"))
    with torch.no_grad():
        posterior = theirs.encode(images[:, :, None]).latent_dist
        latents = (posterior.mode()[:, :, 0] - mean) / std
        close(vae.encode(images), latents)
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
        sample = posterior.mean[:, :, 0] + posterior.std[:, :, 0] * noise
        close(vae.encode(images, noise), (sample - mean) / std)
        decoded = theirs.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
        close(vae.decode(latents), decoded)
    weight = vae.inner.encoder.conv_in.weight.requires_grad_()
    other = theirs.requires_grad_(False).encoder.conv_in.weight.requires_grad_()
    vae.encode(images).square().sum().backward()
    ((theirs.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std).square().sum().backward()
    # flat convolutions hold what the video's do to one frame: its last slice in time
    close(weight.grad, other.grad if weight.ndim == other.ndim else other.grad[:, :, -1])
    other.requires_grad_(False).grad = None


def test_autoencoder_in_wans_layout(inputs, vae_pair, tmp_path):
    published = json.loads((GOLDEN / "keys/qwen_image_vae_names.json").read_text())
    renamed = {}
    for name, tensor in load_file(inputs.model("qwen_image_vae")).items():
        module, leaf = name.rsplit(".", 1)
        renamed[f"{published[module]}.{leaf}"] = tensor
    path = tmp_path / "wan.safetensors"
    save_file_atomic(renamed, path)
    vae = load_qwen_image_vae(TensorFile(path), dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(vae.inner.parameters(), vae_pair[0].parameters(), strict=True))
    assert len(vae_names(renamed)) == len(renamed)


def test_qwen3_equals_transformers(inputs):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = inputs.model("qwen3")
    ours = load_qwen3(open_qwen3("--qwen3", path), path, need=Need())
    config = Qwen3Config(
        vocab_size=559,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    other = Qwen3ForCausalLM(config).eval()
    missing, unexpected = other.load_state_dict(load_file(path), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    ids = torch.randint(0, 500, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    with torch.no_grad():
        close(ours(ids, attention_mask=mask).last_hidden_state, other.model(ids, attention_mask=mask).last_hidden_state)
    name = "layers.1.mlp.up_proj.weight"
    close(*gradients_of(ours, other.model, lambda module: module(ids).last_hidden_state, name))
