"""Anima: files it reads, its flags, caches, adapters, and where it is right and the recorded program is not."""

import json
import shutil

import numpy as np
import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training

from library import anima_utils
from library.anima_models import Anima
from library.base.errors import CheckpointError, UserError
from library.base.safetensors_io import TensorFile, load_file, save_file_atomic
from library.batch import StepInputs
from library.diffusion.losses import SampleLoss
from library.modules.components import Need
from library.modules.qwen3 import load_qwen3, open_qwen3
from library.sampling.prompts import make_request
from library.strategy_anima import AnimaConditioning, AnimaDenoisingStrategy, build_strategies
from library.train_util import find_problems, make_options
from networks import lora_anima

pytestmark = pytest.mark.family


def train(inputs, folder, *flags, subset="", batch_size=1, steps=2):
    """Losses of a short training."""
    folder.mkdir(parents=True, exist_ok=True)
    toml = dataset_toml(folder, inputs, subset=subset, batch_size=batch_size)
    arguments = network_arguments("anima", inputs, folder, toml, *flags)
    return list(run_training("anima", [*arguments, "--max_train_steps", str(steps)]).losses)


def options_of(inputs, **more):
    values = {
        "pretrained_model_name_or_path": inputs.model("anima"),
        "qwen3": inputs.model("qwen3"),
        "vae": inputs.model("qwen_image_vae"),
        "tokenizer_cache_dir": str(inputs.folder / "tokenizers"),
        "output_dir": "out",
        "dataset_config": "d.toml",
    }
    return make_options("anima", "network", {**values, **more})


@pytest.fixture(scope="module")
def plain(inputs, tmp_path_factory):
    """Losses that other flags are compared with."""
    return train(inputs, tmp_path_factory.mktemp("plain"), "--network_train_unet_only")


# --- files ------------------------------------------------------------------------------------------------------------


def save(path, tensors, metadata=None):
    save_file_atomic(tensors, path, metadata)
    return str(path)


def state_of(path, **more):
    file = anima_utils.open_transformer(path)
    return anima_utils.load_transformer(file, Need(), anima_utils.open_adapter(more.get("adapter"))).state_dict()


def test_every_layout_of_the_transformer(inputs, tmp_path):
    """With and without `net.`, cut into several files, the buffers of rotary frequencies, the adapter apart."""
    tensors = load_file(inputs.model("anima"))
    assert all(name.startswith("net.") for name in tensors)
    known = state_of(inputs.model("anima"))
    assert {f"net.{name}" for name in known} == {name for name in tensors if "pos_embedder" not in name}
    bare = {name.removeprefix("net."): tensor for name, tensor in tensors.items()}
    bare |= {"pos_embedder.seq": torch.arange(8.0), "pos_embedder.dim_spatial_range": torch.zeros(5)}
    names = sorted(bare)
    for number, part in enumerate((names[:50], names[50:]), 1):
        save(tmp_path / f"cut-{number:05d}-of-00002.safetensors", {name: bare[name] for name in part})
    apart = {name: tensor for name, tensor in bare.items() if name.startswith("llm_adapter.")}
    adapter = save(tmp_path / "adapter.safetensors", {n.removeprefix("llm_adapter."): t + 1 for n, t in apart.items()})
    for found in (
        state_of(save(tmp_path / "bare.safetensors", bare)),
        state_of(str(tmp_path / "cut-00001-of-00002.safetensors")),
    ):
        assert all(torch.equal(found[name], known[name]) for name in known) and len(found) == len(known)
    other = state_of(inputs.model("anima"), adapter=adapter)
    for name, tensor in known.items():
        assert torch.equal(other[name], tensor + 1 if name.startswith("llm_adapter.") else tensor)
    without = {name: tensor for name, tensor in bare.items() if not name.startswith("llm_adapter.")}
    headless = save(tmp_path / "headless.safetensors", without)
    assert len(state_of(headless, adapter=adapter)) == len(known)
    with pytest.raises(CheckpointError, match="holds no text adapter.*--llm_adapter_path"):
        state_of(headless)
    (tmp_path / "cut-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cut-00002-of-00002.safetensors is not beside it"):
        state_of(str(tmp_path / "cut-00001-of-00002.safetensors"))


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("pretrained_model_name_or_path", "qwen3", "is a Qwen3 text encoder, for --qwen3"),
        ("pretrained_model_name_or_path", "qwen_image_vae", "is an autoencoder, for --vae"),
        ("pretrained_model_name_or_path", "flux1_dev", "is a FLUX.1 checkpoint"),
        ("pretrained_model_name_or_path", "t5xxl", "holds no Anima transformer"),
        ("qwen3", "anima", "holds no Qwen3 text encoder"),
        ("vae", "ae", "holds no Qwen-Image VAE"),
        ("llm_adapter_path", "qwen3", "holds no text adapter"),
    ],
)
def test_foreign_files_are_named(inputs, flag, name, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        anima_utils.inspect(options_of(inputs, **{flag: inputs.model(name)}))
    assert f"{name}_tiny" in str(caught.value) and len(caught.value.problems) == 1


def test_missing_files_are_named_together(inputs):
    options = make_options("anima", "network", {"pretrained_model_name_or_path": "m", "output_dir": "o"})
    texts = [str(problem).split(":")[0] for problem in find_problems("anima", "network", options)]
    assert texts == ["--dataset_config", "--qwen3", "--vae"]


def test_a_text_encoder_of_another_width(inputs, tmp_path):
    tensors = {name: t[..., :32] if t.shape[-1] == 64 else t for name, t in load_file(inputs.model("qwen3")).items()}
    with pytest.raises(CheckpointError, match="width 32, but this model's text adapter reads 64"):
        anima_utils.inspect(options_of(inputs, qwen3=save(tmp_path / "q.safetensors", tensors)))


def test_qwen3_from_a_folder(inputs, tmp_path):
    """In several files, with an output layer that is not read; `config.json` says what shapes cannot."""
    tensors = load_file(inputs.model("qwen3"))
    names = sorted(tensors)
    save(tmp_path / "model-00001-of-00002.safetensors", {name: tensors[name] for name in names[:9]})
    rest = {name: tensors[name] for name in names[9:]} | {"lm_head.weight": torch.zeros(559, 64)}
    save(tmp_path / "model-00002-of-00002.safetensors", rest)
    config = {"hidden_size": 64, "rope_theta": 5e5, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder = load_qwen3(open_qwen3("--qwen3", str(tmp_path)), str(tmp_path), need=Need())
    assert encoder.config.rope_parameters["rope_theta"] == 5e5 and encoder.config.rms_norm_eps == 1e-5
    state = encoder.state_dict()
    assert all(torch.equal(state[name.removeprefix("model.")], tensor) for name, tensor in tensors.items())
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1024}))
    with pytest.raises(CheckpointError, match="hidden_size = 1024, but tensor shapes say 64"):
        load_qwen3(open_qwen3("--qwen3", str(tmp_path)), str(tmp_path), need=Need())


# --- what the recorded program does otherwise -------------------------------------------------------------------------


def test_rotary_tables_do_not_depend_on_the_weights_format(inputs):
    """In bfloat16 angles would be 0.1 rad off; no buffer is saved either."""
    model = anima_utils.load_transformer(anima_utils.open_transformer(inputs.model("anima")), Need())
    wide = model.rotary_tables(64, 64, "cpu")
    assert not any("pos_embedder" in name for name in model.state_dict())
    half = model.to(torch.bfloat16).rotary_tables(64, 64, "cpu")
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(wide, half, strict=True))


def test_weights_of_noise_levels_stay_with_their_images(inputs):
    """Losses [1, 2] of weights [10, 0.1] are 10 and 0.2: no product of all with all."""
    options = options_of(inputs, weighting_scheme="sigma_sqrt")
    process = build_strategies(options, anima_utils.inspect(options)).denoising.process
    sigmas = torch.tensor([10.0, 0.1]) ** -0.5
    weight = process.weight(1000 * sigmas, sigmas)
    assert weight.shape == (2,) and torch.allclose(weight, torch.tensor([10.0, 0.1]))
    target = torch.zeros(2, 16, 2, 2)
    prediction = torch.tensor([1.0, 2.0]).sqrt().view(2, 1, 1, 1).expand_as(target)
    batch = type("B", (), {"loss_weights": torch.ones(2), "masks": None, "size": 2})
    inputs_of = {"batch": batch, "latents": target, "noise": target, "noisy": target, "target": target}
    step = StepInputs(**inputs_of, timesteps=1000 * sigmas, sigmas=sigmas, weight=weight, module_seed=0)
    losses = SampleLoss(process=process, kind="l2", schedule="constant", c=0.1, scale=1.0)(prediction, step)
    assert torch.allclose(losses, torch.tensor([10.0, 0.2]))
    cosmap = options_of(inputs, weighting_scheme="cosmap")
    weights = build_strategies(cosmap, anima_utils.inspect(cosmap)).denoising.process.weight(1000 * sigmas, sigmas)
    assert weights.shape == (2,)


def test_huber_with_a_schedule_trains(inputs, tmp_path):
    more = ("--loss_type", "huber", "--huber_schedule", "exponential", "--huber_c", "0.1")
    assert np.isfinite(train(inputs, tmp_path, "--network_train_unet_only", *more, steps=1)).all()


def test_padding_of_the_text_encoder_is_not_seen(inputs):
    """Rows behind the mask change nothing: the text adapter masks them in training too."""
    model = anima_utils.load_transformer(anima_utils.open_transformer(inputs.model("anima")), Need())
    strategy = AnimaDenoisingStrategy(process=None)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    states = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, 1, 0]])
    latents = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1))

    def velocity(padding):
        filled = torch.where(mask.bool()[..., None], states, padding)
        found = AnimaConditioning(prompt_embeds=filled, attn_mask=mask, t5_input_ids=ids, t5_attn_mask=ids.clamp(max=1))
        with torch.no_grad():
            return strategy.velocity(model, latents, torch.tensor([0.5]), found)

    assert torch.equal(velocity(0.0), velocity(7.0))


def test_samples_are_made_in_float32_steps(inputs):
    """The state of the image stays wide while the model computes in bfloat16."""
    file = anima_utils.open_transformer(inputs.model("anima"))
    model = anima_utils.load_transformer(file, Need(dtype=torch.bfloat16))
    strategy = AnimaDenoisingStrategy(process=None)
    seen = []

    def velocity(denoiser, noisy, sigmas, conditioning):
        seen.append((noisy.dtype, sigmas.dtype))
        return AnimaDenoisingStrategy.velocity(strategy, denoiser, noisy, sigmas, conditioning)

    strategy.velocity = velocity
    mask = torch.ones(1, 4, dtype=torch.int64)
    text = AnimaConditioning(prompt_embeds=torch.zeros(1, 4, 64), attn_mask=mask, t5_input_ids=mask, t5_attn_mask=mask)
    request = make_request(0, {"sample_steps": 3, "scale": 1.0}, strategy.sample_defaults)
    assert (request.flow_shift, request.width) == (3.0, 512)
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made = strategy.sample_latents(model, request, text, None, noise, torch.Generator())
    assert seen == [(torch.float32, torch.float32)] * 3 and made.dtype == torch.float32


def test_noise_levels_of_samples():
    strategy = AnimaDenoisingStrategy(process=None)
    request = make_request(0, {"prompt": "", "sample_steps": 2}, strategy.sample_defaults)
    assert strategy.sample_levels(request, torch.zeros(1)).tolist() == pytest.approx([1.0, 0.75, 0.0])


# --- captions and caches ----------------------------------------------------------------------------------------------


def test_an_empty_caption(inputs):
    """Zeros, nothing seen, a lone end token: what dropped captions of the recorded program are replaced by."""
    options = options_of(inputs, qwen3_max_token_length=6, t5_max_token_length=4)
    strategies = build_strategies(options, anima_utils.inspect(options))
    encoder = anima_utils.load_components(options, Need(denoiser=False, vae=False)).text_encoders[0]
    masks = []
    encoder.register_forward_pre_hook(lambda _, args, named: masks.append(named["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        found = strategies.text_encoding.encode_tokens(strategies.tokenize.tokenize(["", "a cat"]), [encoder])
    assert found.prompt_embeds[0].abs().max() == 0 and found.prompt_embeds[1].abs().max() > 0
    assert masks[0].sum(dim=1).tolist() == [1, int(found.attn_mask[1].sum())]  # kernels may not like empty rows
    assert found.attn_mask[0].tolist() == [0] * 6 and found.attn_mask[1].sum() > 0
    assert found.t5_input_ids[0].tolist() == [1, 0, 0, 0] and found.t5_attn_mask[0].tolist() == [1, 0, 0, 0]


def test_trained_text_encoders_survive_empty_captions(inputs, tmp_path):
    """No row of attention is without a place to look at, so gradients stay numbers."""
    losses = train(inputs, tmp_path, subset="  caption_dropout_rate = 1.0")
    assert np.isfinite(losses).all()
    norms = [event["norm/grad"] for event in events(tmp_path / "out") if event["event"] == "step"]
    assert np.isfinite(norms).all() and min(norms) > 0
    assert any(name.startswith("lora_te_layers_2_mlp_") for name in load_file(tmp_path / "out" / "last.safetensors"))


def own_data(inputs, folder):
    shutil.copytree(inputs.folder / "data" / "img", folder / "img")
    toml = dataset_toml(folder, inputs)
    toml.write_text(toml.read_text().replace(str(inputs.folder / "data" / "img"), str(folder / "img")))
    return folder / "img", toml


def test_caches_on_disk_have_the_reference_s_arrays(inputs, tmp_path, plain):
    images, toml = own_data(inputs, tmp_path)
    flags = ("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    flags += ("--caption_dropout_rate", "0.0", "--max_train_steps", "2")
    arguments = network_arguments("anima", inputs, tmp_path, toml, *flags)
    assert list(run_training("anima", arguments).losses) == pytest.approx(plain, rel=1e-5)
    text = np.load(images / "cat_anima_te.npz")
    found = {
        name: (text[name].shape, str(text[name].dtype)) for name in text if not name.startswith(("caption_d", "recipe"))
    }
    del found["caption"]
    assert found == {
        "prompt_embeds": ((32, 64), "float32"),
        "attn_mask": ((32,), "int64"),
        "t5_input_ids": ((32,), "int32"),
        "t5_attn_mask": ((32,), "int32"),
    }
    assert text["caption_dropout_rate"].shape == () and text["caption_dropout_rate"].dtype == np.float32
    latents = np.load(images / "cat_0176x0132_anima.npz")
    assert latents["latents_16x16"].shape == (16, 16, 16)


def test_a_foreign_cache_with_another_dropout_rate_is_read(inputs, tmp_path, messages):
    """The rate is this run's, not the one that a file was made with; five-dimensional latents are read."""
    images, toml = own_data(inputs, tmp_path)
    flags = ("--network_train_unet_only", "--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    flags += ("--max_train_steps", "2")
    arguments = network_arguments("anima", inputs, tmp_path, toml, *flags)
    own = list(run_training("anima", arguments).losses)
    for path in images.glob("*.npz"):
        arrays = {n: a for n, a in np.load(path).items() if not n.startswith(("caption", "recipe", "source"))}
        if path.stem.endswith("_te"):
            arrays["caption_dropout_rate"] = np.float32(0.9)
        else:
            arrays |= {name: a[:, None] for name, a in arrays.items() if name.startswith("latents")}
        np.savez(path, **arrays)
    messages.clear()
    assert list(run_training("anima", arguments).losses) == own
    assert "caches of latents: 10 ready, made elsewhere" in messages.text
    assert "caches of text encoder outputs: 10 ready, made elsewhere" in messages.text


def test_dropped_captions_are_the_same_from_a_cache(inputs, tmp_path, plain):
    flags = ("--network_train_unet_only",)
    subset = "  caption_dropout_rate = 1.0"
    fresh = train(inputs, tmp_path / "fresh", *flags, subset=subset)
    cached = train(inputs, tmp_path / "cached", *flags, "--cache_text_encoder_outputs", subset=subset)
    assert cached == pytest.approx(fresh, rel=1e-6) and cached != pytest.approx(plain, rel=1e-5)


# --- flags ------------------------------------------------------------------------------------------------------------

SAME = {
    "checkpointing": ("--gradient_checkpointing",),
    "swapping": ("--blocks_to_swap", "1"),
    "attention": ("--attn_mode", "sdpa"),
    "xformers' place": ("--mem_eff_attn",),
    "split": ("--split_attn",),
    "compiled": ("--compile", "--compile_backend", "eager"),
    "VAE in two dimensions": ("--qwen_image_vae_2d",),
    "VAE in bands": ("--vae_chunk_size", "16"),
    "VAE without a cache": ("--vae_disable_cache",),
}


@pytest.fixture(scope="module")
def plain_pairs(inputs, tmp_path_factory):
    return train(inputs, tmp_path_factory.mktemp("pairs"), "--network_train_unet_only", batch_size=2)


@pytest.mark.parametrize("name", SAME)
def test_ways_to_compute_give_the_same_losses(name, inputs, tmp_path, plain_pairs):
    losses = train(inputs, tmp_path, "--network_train_unet_only", *SAME[name], batch_size=2)
    assert losses == pytest.approx(plain_pairs, rel=1e-5)


def test_split_attention_takes_one_image_at_a_time(inputs, tmp_path, monkeypatch):
    from library.modules import attention

    sizes = set()
    real = attention.BACK_ENDS["torch"][0]

    def watched(q, k, v, *, mask=None):
        sizes.add(q.shape[0])
        return real(q, k, v, mask=mask)

    monkeypatch.setitem(attention.BACK_ENDS, "torch", (watched, None, ""))
    train(inputs, tmp_path / "a", "--network_train_unet_only", batch_size=2, steps=1)
    assert sizes == {2}
    sizes.clear()
    train(inputs, tmp_path / "b", "--network_train_unet_only", "--split_attn", batch_size=2, steps=1)
    assert sizes == {1}


@pytest.fixture(scope="module")
def places(inputs, tmp_path_factory):
    """Files with other weights."""
    folder = tmp_path_factory.mktemp("other")
    found = {}
    for key, name in {"model": "anima", "qwen3": "qwen3", "vae": "qwen_image_vae"}.items():
        changed = {n: t * 1.3 if t.ndim > 1 else t for n, t in load_file(inputs.model(name)).items()}
        found[key] = save(folder / f"{key}.safetensors", changed, TensorFile(inputs.model(name)).metadata)
    tensors = {n: t * 1.3 for n, t in load_file(inputs.model("anima")).items() if "llm_adapter" in n}
    found["adapter"] = save(folder / "adapter.safetensors", tensors)
    return found


OTHER = {
    "pretrained_model_name_or_path": ("--pretrained_model_name_or_path", "{model}"),
    "qwen3": ("--qwen3", "{qwen3}"),
    "vae": ("--vae", "{vae}"),
    "llm_adapter_path": ("--llm_adapter_path", "{adapter}"),
    "qwen3_max_token_length": ("--qwen3_max_token_length", "4"),
    "t5_max_token_length": ("--t5_max_token_length", "40"),
    "weighting_scheme": ("--weighting_scheme", "cosmap"),
    "timestep_sampling": ("--timestep_sampling", "flux_shift"),
    "sigmoid_scale": ("--sigmoid_scale", "2"),
    "discrete_flow_shift": ("--timestep_sampling", "shift", "--discrete_flow_shift", "4"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_flag_changes_the_losses(name, inputs, tmp_path, plain, places):
    given = [part.format(**places) for part in OTHER[name]]
    losses = train(inputs, tmp_path, "--network_train_unet_only", *given, steps=1)
    assert losses[0] != pytest.approx(plain[0], rel=1e-5)


def test_a_tokenizer_of_its_own(inputs, tmp_path, plain):
    """In place of the one in the folder of tokenizers; a wrong folder is named."""
    folder = tmp_path / "t5"
    shutil.copytree(inputs.folder / "tokenizers" / "google_t5-v1_1-xxl", folder)
    tokenizers = tmp_path / "tokenizers"
    shutil.copytree(inputs.folder / "tokenizers" / "Qwen_Qwen3-0.6B", tokenizers / "Qwen_Qwen3-0.6B")
    flags = ("--tokenizer_cache_dir", str(tokenizers), "--t5_tokenizer_path")
    losses = train(inputs, tmp_path / "a", "--network_train_unet_only", *flags, str(folder))
    assert losses == pytest.approx(plain, rel=1e-6)
    with pytest.raises(UserError, match="--t5_tokenizer_path.*is no folder with a tokenizer"):
        train(inputs, tmp_path / "b", "--network_train_unet_only", *flags, str(tmp_path))


def test_a_tokenizer_with_more_tokens_than_the_text_adapter(inputs, tmp_path):
    """Found before any step: its ids would read behind the table."""
    tensors = load_file(inputs.model("anima"))
    tensors["net.llm_adapter.embed.weight"] = tensors["net.llm_adapter.embed.weight"][:100]
    model = save(tmp_path / "short.safetensors", tensors)
    with pytest.raises(UserError, match="the T5 tokenizer makes ids up to"):
        train(inputs, tmp_path, "--network_train_unet_only", "--pretrained_model_name_or_path", model)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"fp8_base": True, "mixed_precision": "bf16"}, "--fp8_base"),
        ({"fp8_base_unet": True, "mixed_precision": "bf16"}, "--fp8_base_unet"),
        ({"cache_text_encoder_outputs": True}, "--cache_text_encoder_outputs"),
        ({"compile": True, "compile_fullgraph": True, "split_attn": True}, "--compile_fullgraph"),
        ({"qwen3_max_token_length": 0}, "--qwen3_max_token_length"),
        ({"vae_chunk_size": 0}, "--vae_chunk_size"),
    ],
)
def test_contradictions(inputs, values, where):
    (problem,) = find_problems("anima", "network", options_of(inputs, **values))
    assert problem.where == where


def test_kernels_without_gradients_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match="--attn_mode = 'sageattn': its kernels compute no gradients"):
        train(inputs, tmp_path, "--attn_mode", "sageattn")


def test_what_has_no_effect_is_said(inputs, tmp_path, messages):
    train(inputs, tmp_path, "--network_train_unet_only", "--mod_lr", "1e-5", steps=1)
    assert "--mod_lr has no effect: rates of parts are for training the whole model" in messages.text
    assert "--t5_max_token_length 32: image programs show the model 512 text rows" in messages.text


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(inputs):
    components = anima_utils.load_components(options_of(inputs), Need(vae=False))
    return components.text_encoders[0], components.denoiser


def make(parts, **arguments):
    return lora_anima.create_network(1.0, 4, 1.0, None, *parts, **arguments)


def paths(network):
    return {adapter.path for adapter in network.loras}


def test_layers_are_chosen_by_whole_paths(parts):
    """`exclude_patterns` and `include_patterns` as Python lists or one pattern; text encoders too."""
    plain = paths(make(parts))
    assert not any("modulation" in path or "embedder" in path or "final" in path for path in plain)
    less = paths(make(parts, exclude_patterns=r"['.*cross_attn.*', '.*\\.mlp\\..*']"))
    assert less == {path for path in plain if "cross_attn" not in path and ".mlp." not in path}
    assert not any(path.startswith("layers.") and "mlp" in path for path in less)
    assert paths(make(parts, exclude_patterns="cross_attn")) == plain  # no whole path
    more = paths(make(parts, include_patterns=r".*final_layer.*"))
    assert more - plain == {"final_layer.linear", "final_layer.adaln_modulation.1", "final_layer.adaln_modulation.2"}
    back = make(parts, exclude_patterns="['.*']", include_patterns=r"['blocks\\.0\\.self_attn\\.q_proj']")
    assert paths(back) == {"blocks.0.self_attn.q_proj"}
    with pytest.raises(UserError, match="a valid regular expression"):
        make(parts, exclude_patterns="['(']")


def test_the_text_adapter_is_adapted_when_asked(parts):
    added = paths(make(parts, train_llm_adapter="true")) - paths(make(parts))
    assert len(added) == 20 and all(path.startswith("llm_adapter.blocks.") for path in added)


def test_ranks_and_rates_by_whole_path(parts):
    """A pattern that is only found inside a path means no layer."""
    network = make(
        (None, parts[1]),
        network_reg_dims=r"blocks\.0\..*=8,self_attn=2",
        network_reg_lrs=r".*\.mlp\.layer1=0.5,mlp=0.25",
    )
    ranks = {adapter.path: adapter.lora_dim for adapter in network.loras}
    assert {rank for path, rank in ranks.items() if path.startswith("blocks.0.")} == {8}
    assert {rank for path, rank in ranks.items() if path.startswith("blocks.1.")} == {4}
    network.apply_to(None, parts[1], False, True)
    groups, labels = network.prepare_optimizer_params_with_multiple_te_lrs(None, 1e-3, 1e-3)
    network.restore_forwards()
    assert labels == ["unet", "reg_lr_0"] and [group["lr"] for group in groups] == [1e-3, 0.5]
    assert len(groups[1]["params"]) == 4


def test_a_file_decides_which_layers_are_adapted(parts, tmp_path):
    """Also those that are left out by default, and the text adapter."""
    network = make(parts, include_patterns="['.*']", train_llm_adapter="true")
    network.apply_to(*parts, True, True)
    network.save_weights(tmp_path / "all.safetensors", None, {})
    network.restore_forwards()
    again, _ = lora_anima.create_network_from_weights(1.0, tmp_path / "all.safetensors", None, *parts)
    assert paths(again) == paths(network) and len(again.loras) == len(network.loras)


def test_the_model_class_names_are_those_of_the_table(parts):
    classes = {type(module).__name__ for part in parts for module in part.modules()}
    for group in lora_anima.TABLE.groups:
        assert set(group.classes) & classes
    assert isinstance(parts[1], Anima)
