"""Lumina Image 2.0: files, text, noise levels, guidance, training through the script's own door."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from support.runs import GOLDEN, dataset_toml, network_arguments, run_training

from library import lumina_utils
from library.base.errors import CheckpointError, UserError
from library.base.safetensors_io import TensorFile, load_file
from library.batch import StepInputs
from library.lumina_models import NextDiT
from library.modules.components import Need
from library.modules.gemma2 import gemma2_names, load_gemma2
from library.options.attention import chosen_back_end
from library.sampling.prompts import make_request
from library.strategy_lumina import LuminaConditioning, LuminaDenoisingStrategy, build_strategies, renormed, valid_text
from library.train_util import find_problems, make_options, parse_options

TEXT_MARK = "text_encoders.gemma2_2b.transformer.model."


def options_for(inputs, *more):
    return parse_options("lumina", "network", [*inputs.base("lumina"), *more])


def strategies_for(inputs, *more):
    options = options_for(inputs, *more)
    return build_strategies(options, lumina_utils.inspect(options))


# --- files ------------------------------------------------------------------------------------------------------------


def keys(name):
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / "keys" / f"{name}.json").read_text()).items()}


class Header:
    """Names and shapes of a file that is not there."""

    def __init__(self, shapes):
        self.path, self.metadata, self.shapes = "published", {}, shapes


def test_names_and_shapes_at_the_published_size():
    shapes = keys("lumina_transformer")
    params = lumina_utils.lumina_params(Header(shapes), "")
    assert (params.num_heads, params.num_kv_heads, params.num_layers, params.axes_dim) == (24, 8, 26, (32, 32, 32))
    with torch.device("meta"):
        model = NextDiT(params)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def test_names_and_shapes_of_gemma_at_the_published_size():
    from transformers import Gemma2Config, Gemma2Model

    from library.modules.gemma2 import gemma2_config

    shapes = keys("lumina_gemma2")
    with torch.device("meta"):
        model = Gemma2Model(Gemma2Config(**gemma2_config(shapes)))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


@pytest.fixture(scope="module")
def everything(inputs, tmp_path_factory):
    """All parts in one file, as other programs keep them, with what they add; one tensor is left out."""
    tensors = {f"model.diffusion_model.{name}": t for name, t in load_file(inputs.model("lumina2")).items()}
    del tensors["model.diffusion_model.norm_final.weight"]
    tensors |= {f"vae.{name}": t for name, t in load_file(inputs.model("ae")).items()}
    tensors |= {TEXT_MARK + name: t for name, t in load_file(inputs.model("gemma2_2b")).items()}
    tensors["text_encoders.gemma2_2b.logit_scale"] = torch.tensor(4.6)
    path = tmp_path_factory.mktemp("all") / "all.safetensors"
    save_file(tensors, path)
    return str(path)


def test_one_file_for_everything(inputs, everything):
    """The same weights, sizes and identities as in files of their own."""
    apart = options_for(inputs)
    joined = options_for(
        inputs, "--pretrained_model_name_or_path", everything, "--gemma2", everything, "--ae", everything
    )
    found, expected = lumina_utils.inspect(joined), lumina_utils.inspect(apart)
    assert found.config == expected.config
    assert found.num_parameters == {
        **expected.num_parameters,
        "transformer": expected.num_parameters["transformer"] - 96,
    }
    assert lumina_utils.identities(joined) == lumina_utils.identities(apart)
    one, other = (lumina_utils.load_components(options, Need()) for options in (joined, apart))
    for ours, theirs in (
        (one.denoiser, other.denoiser),
        (one.vae, other.vae),
        (one.text_encoders[0], other.text_encoders[0]),
    ):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        assert all(torch.equal(t, state[name]) for name, t in ours.state_dict().items() if name != "norm_final.weight")
    assert torch.equal(one.denoiser.norm_final.weight, torch.ones(96))


def test_gemma_of_a_language_model(inputs, tmp_path):
    """With `model.` before its names, in any order, beside a head."""
    tensors = load_file(inputs.model("gemma2_2b"))
    save_file(
        {**{f"model.{k}": t for k, t in tensors.items()}, "lm_head.weight": torch.ones(2)}, tmp_path / "lm.safetensors"
    )
    file = TensorFile(tmp_path / "lm.safetensors")
    assert set(gemma2_names(file.names)) == set(tensors)
    assert set(gemma2_names(["lm_head.weight", *reversed(file.names)])) == set(tensors)
    state = load_gemma2(file, need=Need()).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("flux1_dev", "is a FLUX.1 checkpoint; train it with flux_train_network.py"),
        ("gemma2_2b", "is a Gemma-2 text encoder, for --gemma2"),
        ("ae", "is an autoencoder, for --ae"),
        ("sd15", "holds no Lumina Image 2.0 transformer"),
    ],
)
def test_other_files_are_named(inputs, model, message):
    with pytest.raises(CheckpointError, match=message):
        lumina_utils.inspect(options_for(inputs, "--pretrained_model_name_or_path", inputs.model(model)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("time_caption_embed.caption_embedder.0.weight", "diffusers layout"),
        ("cap_pad_token", "Z-Image"),
        ("layers.0.attention.wq.weight", "Lumina-Next"),
    ],
)
def test_other_layouts_are_named(inputs, tmp_path, name, message):
    save_file({name: torch.ones(1), "cap_embedder.0.weight": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=message):
        lumina_utils.open_transformer(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    ("flag", "model", "message"),
    [("--gemma2", "t5xxl", "holds no Gemma-2 text encoder"), ("--ae", "gemma2_2b", "holds no autoencoder")],
)
def test_wrong_parts_are_named(inputs, flag, model, message):
    with pytest.raises(CheckpointError, match=message) as error:
        lumina_utils.inspect(options_for(inputs, flag, inputs.model(model)))
    assert str(error.value).startswith(flag)


def test_only_main_blocks_are_swapped(inputs):
    model = lumina_utils.load_components(options_for(inputs), Need(vae=False, text_encoders=False)).denoiser
    assert strategies_for(inputs).denoising.blocks(model)[-2:] == list(model.layers)
    lumina_utils.inspect(options_for(inputs, "--blocks_to_swap", "2"))
    with pytest.raises(UserError, match="2 blocks that can be swapped"):
        lumina_utils.inspect(options_for(inputs, "--blocks_to_swap", "3"))


def test_a_tokenizer_inside_the_file(inputs, tmp_path):
    """A tensor of bytes is enough; a folder of the user comes first."""
    import io

    import sentencepiece

    model = io.BytesIO()
    words = [path.read_text() for path in sorted((inputs.folder / "data" / "img").glob("*.txt"))]
    pieces = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "bos_piece": "<bos>"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        eos_piece="<eos>",
        add_dummy_prefix=False,
        minloglevel=2,
        **pieces,
    )
    tensors = load_file(inputs.model("gemma2_2b"))
    tensors["spiece_model"] = torch.frombuffer(bytearray(model.getvalue()), dtype=torch.uint8)
    save_file(tensors, tmp_path / "gemma.safetensors")
    given = ("--gemma2", str(tmp_path / "gemma.safetensors"))
    ids, mask = strategies_for(inputs, *given, "--tokenizer_cache_dir", str(tmp_path)).tokenize.tokenize(["a cat"])
    expected = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("a cat")
    assert ids[0, : int(mask.sum())].tolist() == [2, *expected]
    ours, plain = (strategies_for(inputs, *more).tokenize.tokenize(["a cat"])[0] for more in (given, ()))
    assert torch.equal(ours, plain)


# --- text -------------------------------------------------------------------------------------------------------------

PROMPT = "You are an assistant."


def text_of(strategies, tokens):
    ids, mask = tokens
    return strategies.tokenize.gemma.loaded.decode(ids[0, 1 : int(mask.sum())])


def test_padding_is_on_the_right(inputs):
    ids, mask = strategies_for(inputs).tokenize.tokenize(["a cat", ""])
    assert ids.shape == mask.shape == (2, 32)
    assert ids[:, 0].tolist() == [2, 2] and mask.sum(1).tolist() == [4, 1]
    assert torch.equal(mask, mask.sort(dim=1, descending=True).values)
    assert strategies_for(inputs, "--gemma2_max_token_length", "256").tokenize.tokenize(["a"])[0].shape == (1, 256)


def test_where_the_system_prompt_stands(inputs):
    """Before captions and prompts; not before negative prompts, and not before captions that were dropped."""
    wide = ("--gemma2_max_token_length", "128")
    plain, prompted = strategies_for(inputs, *wide), strategies_for(inputs, *wide, "--system_prompt", PROMPT)
    both = strategies_for(inputs, *wide, "--system_prompt", PROMPT, "--add_system_prompt_to_negative_prompt")
    full = f"{PROMPT} <Prompt Start> a cat"
    assert text_of(plain, plain.tokenize.tokenize(["a cat"])) == "a cat"
    assert text_of(prompted, prompted.tokenize.tokenize(["a cat"])) == full
    assert text_of(prompted, prompted.tokenize.tokenize_prompt("a cat")) == full
    assert text_of(prompted, prompted.tokenize.tokenize_negative("a cat")) == "a cat"
    assert text_of(both, both.tokenize.tokenize_negative("a cat")) == full
    for strategies in (plain, prompted, both):
        assert text_of(strategies, strategies.tokenize.tokenize([""])) == ""
        assert text_of(strategies, strategies.tokenize.tokenize_negative("")) == ""


def test_the_state_before_the_last_block(inputs):
    gemma = load_gemma2(TensorFile(inputs.model("gemma2_2b")), need=Need())
    strategies = strategies_for(inputs)
    received = []
    gemma.layers[-1].register_forward_pre_hook(lambda _, args: received.append(args[0]))
    tokens = strategies.tokenize.tokenize(["a cat on a sofa"])
    found = strategies.text_encoding.encode_tokens(tokens, [gemma])
    assert torch.equal(found.hidden_state, received[0])
    assert torch.equal(found.input_ids, tokens[0]) and torch.equal(found.attention_mask, tokens[1])


def test_caches_belong_to_prompt_and_length(inputs):
    settings = {
        strategies_for(inputs, *more).text_outputs_caching.settings
        for more in ((), ("--system_prompt", "a"), ("--system_prompt", "b"), ("--gemma2_max_token_length", "40"))
    }
    assert len(settings) == 4


# --- noise and prediction ---------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """Answers with a constant and remembers what it was told."""

    def __init__(self, answer=2.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(answer))
        self.calls = []

    def forward(self, x, times, text, mask):
        self.calls.append((times.clone(), text, mask))
        return torch.full_like(x, 1.0) * self.weight * text.mean()


def conditioning(value=1.0, lengths=(2, 3), size=5):
    mask = torch.stack([(torch.arange(size) < length).long() for length in lengths])
    return LuminaConditioning(
        hidden_state=torch.full((len(lengths), size, 4), value), input_ids=mask, attention_mask=mask
    )


def step(sigma=0.25):
    noise, latents = torch.full((2, 16, 4, 4), 3.0), torch.full((2, 16, 4, 4), 1.0)
    sigmas = torch.full((2,), sigma)
    noisy = (1 - sigma) * latents + sigma * noise
    return StepInputs(None, latents, noise, noisy, 1000 * sigmas, sigmas, noise - latents, None, 0)


@pytest.mark.parametrize(
    ("kind", "prediction"), [("raw", -2.0), ("additive", -(2.0 + 1.5)), ("sigma_scaled", -(1.5 + 0.25 * 2.0))]
)
def test_predictions_have_the_sign_of_the_target(inputs, kind, prediction):
    """The model tells image - noise at time 1 - sigma; losses compare noise - image."""
    strategy = LuminaDenoisingStrategy(None, prediction_type=kind)
    model = Told()
    assert torch.equal(strategy.predict(model, step(), conditioning()), torch.full((2, 16, 4, 4), prediction))
    ((times, text, mask),) = model.calls
    assert times.tolist() == [0.75, 0.75] and times.dtype == torch.float32
    assert text.shape == (2, 3, 4) and mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_time_stays_in_float32(inputs):
    model = Told().to(torch.bfloat16)
    LuminaDenoisingStrategy(None, prediction_type="raw").predict(model, step(0.7071), conditioning())
    assert model.calls[0][0].tolist() == pytest.approx([1 - 0.7071] * 2, rel=1e-6)


def test_text_without_a_mask_where_all_is_valid():
    text, mask = valid_text(conditioning(lengths=(3, 3)))
    assert mask is None and text.shape == (2, 3, 4)


def test_other_predictions_are_warned_of(inputs, messages):
    strategies_for(inputs)
    assert "--model_prediction_type" not in messages.text
    strategies_for(inputs, "--model_prediction_type", "sigma_scaled")
    assert "--model_prediction_type sigma_scaled changes the prediction" in messages.text


# --- samples ----------------------------------------------------------------------------------------------------------


def sample(model, negative=None, **values):
    strategy = LuminaDenoisingStrategy(None, prediction_type="raw")
    request = make_request(0, {"prompt": "a", **values}, strategy.sample_defaults)
    noise = torch.zeros(1, 16, 4, 4)
    positive = conditioning(lengths=(3,))
    with torch.no_grad():
        return strategy.sample_latents(model, request, positive, negative, noise, torch.Generator())


def test_defaults_of_prompts():
    request = make_request(0, {"prompt": "a", "width": 1000}, LuminaDenoisingStrategy.sample_defaults)
    assert (request.width, request.height, request.steps, request.scale) == (992, 1024, 36, 3.5)
    assert (request.cfg_trunc_ratio, request.renorm_cfg, request.flow_shift) == (0.25, 1.0, 6.0)


@pytest.mark.parametrize("shift", [None, 1.0, 3.0])
def test_levels_are_shifted_once(shift):
    """As diffusers and the published sampler: s = 1 - i / n, then shift * s / (1 + (shift - 1) * s)."""
    model = Told()
    values = {} if shift is None else {"flow_shift": shift}
    end = sample(model, sample_steps=4, **values)
    factor = shift or 6.0
    expected = [factor * s / (1 + (factor - 1) * s) for s in (1, 0.75, 0.5, 0.25)]
    assert [1 - float(times) for times, *_ in model.calls] == pytest.approx(expected, abs=1e-6)
    assert float(end.mean()) == pytest.approx(2.0, rel=1e-5)  # from noise along the direction to the image


def test_guidance_ends_with_the_ratio():
    """It acts while the model's time is below it."""
    calls = {}
    for ratio in (0.25, 1.0, 0.0):
        model = Told()
        sample(model, conditioning(0.5, (2,)), sample_steps=4, flow_shift=1.0, cfg_trunc_ratio=ratio)
        calls[ratio] = [float(times) for times, *_ in model.calls]
    assert calls[0.25] == [0.0, 0.0, 0.25, 0.5, 0.75]
    assert calls[1.0] == [0.0, 0.0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert calls[0.0] == [0.0, 0.25, 0.5, 0.75]


def test_guidance_is_followed_and_its_norm_held():
    free = sample(Told(), conditioning(0.5, (2,)), sample_steps=1, scale=3.0, renorm_cfg=0.0)
    assert float(free.mean()) == pytest.approx(1.0 + 3.0 * (2.0 - 1.0))  # unwanted 1, wanted 2
    held = sample(Told(), conditioning(0.5, (2,)), sample_steps=1, scale=3.0, renorm_cfg=1.0)
    assert float(held.mean()) == pytest.approx(2.0)
    looser = sample(Told(), conditioning(0.5, (2,)), sample_steps=1, scale=3.0, renorm_cfg=1.5)
    assert float(looser.mean()) == pytest.approx(3.0)


def test_norms_are_held_sample_by_sample():
    output = torch.stack((torch.full((1, 2, 2), 4.0), torch.full((1, 2, 2), 0.5)))
    found = renormed(output, torch.ones(2, 1, 2, 2), 2.0)
    assert found.mean(dim=(1, 2, 3)).tolist() == pytest.approx([2.0, 0.5])


def test_latents_are_unscaled_once(inputs):
    vae = lumina_utils.load_components(options_for(inputs), Need(denoiser=False, text_encoders=False)).vae
    strategies = strategies_for(inputs)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = strategies.latents_caching.encode(vae, images)
        posterior = vae.encode(images).latent_dist.mean
        assert torch.allclose(latents, (posterior - 0.1159) * 0.3611)
        expected = vae.decode(posterior).sample.clamp(-1, 1)
        assert torch.allclose(strategies.denoising.decode(vae, latents), expected, atol=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------

FILES = {"pretrained_model_name_or_path": "m", "gemma2": "g", "ae": "a", "dataset_config": "d", "output_dir": "o"}


def problems(**values):
    return [str(problem) for problem in find_problems("lumina", "network", make_options("lumina", "network", values))]


def test_missing_files_are_named_together():
    found = problems(dataset_config="d", output_dir="o")
    assert [text.split(":")[0] for text in found] == ["--pretrained_model_name_or_path", "--gemma2", "--ae"]
    assert problems(**FILES) == []


def test_text_of_a_trained_encoder_is_not_cached():
    (text,) = problems(**FILES, cache_text_encoder_outputs=True)
    assert text.startswith("--cache_text_encoder_outputs: needs --network_train_unet_only")
    assert problems(**FILES, cache_text_encoder_outputs=True, network_train_unet_only=True) == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"use_flash_attn": True}, ("--use_flash_attn", "flash")),
        ({"use_flash_attn": True, "sdpa": True}, ("--use_flash_attn", "flash")),
        ({"use_sage_attn": True}, ("--use_sage_attn", "sageattn")),
        ({"mem_eff_attn": True}, ("--mem_eff_attn", "mem_eff_attn")),
        ({}, ("--torch", "torch")),
    ],
)
def test_attention_flags(values, expected):
    assert chosen_back_end(make_options("lumina", "network", {**FILES, **values})) == expected


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(inputs, tmp_path_factory):
    """Losses and folder of a run of two steps with some flags, each made once."""
    made = {}

    def run(*flags, batch_size=2, steps=2):
        key = flags, batch_size, steps
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            toml = dataset_toml(folder, inputs, batch_size=batch_size)
            arguments = network_arguments("lumina", inputs, folder, toml, "--max_train_steps", str(steps), *flags)
            made[key] = SimpleNamespace(losses=list(run_training("lumina", arguments).losses), folder=folder)
        return made[key]

    return run


def tensors(result):
    return load_file(result.folder / "out" / "last.safetensors")


ALONE = "--network_train_unet_only"


@pytest.mark.parametrize(
    "flags",
    [
        ("--blocks_to_swap", "2"),
        ("--mem_eff_attn",),
    ],
    ids=lambda flags: flags[0][2:],
)
def test_the_same_result_by_other_ways(train, flags):
    plain, other = train(ALONE), train(ALONE, *flags)
    assert other.losses == pytest.approx(plain.losses, rel=1e-5)
    expected = tensors(plain)
    for name, tensor in tensors(other).items():
        assert torch.allclose(tensor, expected[name], atol=2e-5), name


def test_compiled_blocks_give_the_same_loss(train):
    """Each in one graph."""
    compiled = train(ALONE, "--compile", "--compile_backend", "eager", "--compile_fullgraph", steps=1)
    assert compiled.losses == pytest.approx(train(ALONE).losses[:1], rel=1e-5)


def test_the_text_encoder_is_trained_too(train):
    """All of its blocks but the last, whose output nothing reads; checkpoints change nothing."""
    result = train()
    moved = {name for name, tensor in tensors(result).items() if name.endswith("lora_up.weight") and tensor.any()}
    blocks = {name.split("_")[3] for name in moved if name.startswith("lora_te_")}
    assert blocks == {"0", "1"}
    assert any(name.startswith("lora_unet_context_refiner") for name in moved)
    assert train("--gradient_checkpointing").losses == pytest.approx(result.losses, rel=1e-5)


def test_narrow_weights_change_losses_a_little(train):
    half = "--mixed_precision", "bf16"
    plain, wide, narrow = train(ALONE), train(ALONE, *half), train(ALONE, *half, "--fp8_base")
    assert narrow.losses != wide.losses != plain.losses
    assert narrow.losses == pytest.approx(wide.losses, rel=0.02)
    assert wide.losses == pytest.approx(plain.losses, rel=0.02)


def test_embedders_and_split_projections(train):
    """Layers outside of blocks; q, k and v of unequal sizes become one file that reads as usual."""
    state = tensors(train(ALONE, "--network_args", "embedder_dims=2,3,4", "split_qkv=True"))
    ranks = {name: tensor.shape[0] for name, tensor in state.items() if name.endswith("lora_down.weight")}
    assert ranks["lora_unet_x_embedder.lora_down.weight"] == 2
    assert ranks["lora_unet_t_embedder_mlp_2.lora_down.weight"] == 3
    assert ranks["lora_unet_cap_embedder_1.lora_down.weight"] == 4
    assert ranks["lora_unet_layers_0_attention_qkv.lora_down.weight"] == 12
    up = state["lora_unet_layers_0_attention_qkv.lora_up.weight"]
    assert up.shape == (192, 12) and up[:96, :4].any() and up[144:, 8:].any()
    assert not up[:96, 4:].any() and not up[96:144, :4].any() and not up[96:144, 8:].any() and not up[144:, :8].any()


def test_ranks_by_kind_of_layer(train):
    arguments = ("attn_dim=1", "mlp_dim=2", "mod_dim=3", "refiner_dim=5")
    state = tensors(train(ALONE, "--network_args", *arguments))
    ranks = {name.split(".")[0]: t.shape[0] for name, t in state.items() if name.endswith("lora_down.weight")}
    assert ranks["lora_unet_layers_0_attention_out"] == 1
    assert ranks["lora_unet_noise_refiner_0_feed_forward_w2"] == 2
    assert ranks["lora_unet_final_layer_adaLN_modulation_1"] == 3
    assert ranks["lora_unet_final_layer_linear"] == 4
    alone = tensors(train(ALONE, "--network_args", "refiner_dim=5"))
    assert alone["lora_unet_context_refiner_0_attention_out.lora_down.weight"].shape[0] == 5
    assert alone["lora_unet_layers_0_attention_out.lora_down.weight"].shape[0] == 4


def test_samples_know_prompts_from_negative_ones(inputs, tmp_path, train):
    """The same words in both places: with an instruction before one of them the image is another one. Kept texts make
    the same images as encoders."""
    (tmp_path / "p.txt").write_text("a cat --n a cat --w 64 --h 64 --s 2 --d 1 --l 3 --ctr 1\n")
    more = (ALONE, "--sample_prompts", str(tmp_path / "p.txt"), "--sample_at_first", "--system_prompt", PROMPT)
    wide = ("--gemma2_max_token_length", "128")
    both = "--add_system_prompt_to_negative_prompt"

    def picture(*flags):
        (path,) = (train(*more, *wide, *flags, steps=1).folder / "out" / "sample").glob("*.png")
        return path.read_bytes()

    plain = picture()
    assert plain != picture(both)
    assert plain == picture("--cache_text_encoder_outputs")
