"""What a run does and leaves behind, in one process on tiny models."""

import json
import time

import pytest
import torch
from PIL import Image
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.errors import UserError
from library.base.safetensors_io import load_file, read_header, save_file_atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def arguments(inputs, tmp_path):
    """Arguments of a short SD run, with more flags added."""

    def make(*more, family="sd", **dataset):
        return network_arguments(family, inputs, tmp_path, dataset_toml(tmp_path, inputs, **dataset), *more)

    return make


def test_saving_by_steps_with_rotation(arguments, tmp_path):
    outcome = run_training("sd", arguments("--save_every_n_steps", "1", "--save_last_n_steps", "1"))
    kept = [name for name in names(tmp_path / "out") if name.endswith(".safetensors")]
    assert kept == ["last-step00000003.safetensors", "last-step00000004.safetensors", "last.safetensors"]
    assert [path.name for path in outcome.saved] == kept
    assert read_header(tmp_path / "out" / kept[0])[1]["ss_steps"] == "3"


def test_saving_by_epochs_with_rotation(arguments, tmp_path):
    run_training(
        "sd",
        arguments("--max_train_epochs", "4", "--save_every_n_epochs", "1", "--save_last_n_epochs", "1", batch_size=8),
    )
    kept = [name for name in names(tmp_path / "out") if name.endswith(".safetensors")]
    # the last epoch's result is the final file
    assert kept == ["last-000003.safetensors", "last.safetensors"]
    assert read_header(tmp_path / "out" / "last.safetensors")[1]["ss_epoch"] == "4"


def test_no_name_gives_the_customary_ones(arguments, tmp_path):
    given = arguments("--save_every_n_steps", "2")
    position = given.index("--output_name")
    run_training("sd", given[:position] + given[position + 2 :])
    assert {"at-step00000002.safetensors", "last.safetensors"} <= set(names(tmp_path / "out"))


def test_the_dataset_is_shown_instead_of_trained(arguments, tmp_path, messages):
    outcome = run_training("sd", arguments("--debug_dataset", batch_size=2, subset="flip_aug = true"))
    assert outcome.state is None
    assert names(tmp_path / "out") == ["last_dataset0_128x128.png", "last_dataset0_64x192.png"]
    assert "coins.png: 100x150 resized to 128x192, cut to 64x192 at 32,0" in messages.text
    with Image.open(tmp_path / "out" / "last_dataset0_128x128.png") as sheet:
        assert sheet.width > 300
    assert "look at" in messages.text  # what is odd about the data stands in the plan


def test_nothing_unfinished_is_left(arguments, tmp_path):
    run_training("sd", arguments("--save_every_n_steps", "1"))
    assert not [name for name in names(tmp_path / "out") if name.endswith(".tmp")]


def test_save_precision_and_format(arguments, tmp_path):
    run_training("sd", arguments("--save_precision", "fp16", "--save_model_as", "pt"))
    tensors = torch.load(tmp_path / "out" / "last.pt", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_no_metadata(arguments, tmp_path):
    run_training("sd", arguments("--no_metadata", "--metadata_title", "mine"))
    metadata = read_header(tmp_path / "out" / "last.safetensors")[1]
    kept = {key for key in metadata if key.startswith("ss_")}
    assert kept == {"ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"}
    assert metadata["modelspec.title"] == "mine"


def test_plan_is_shown_before_weights_load(arguments, messages, tmp_path):
    outcome = run_training("sd", arguments("--dry_run"))
    assert outcome.state is None
    assert not (tmp_path / "out").exists()
    for word in ("bucket 64x192", "10 images, 10 with caption", "optimizer steps", "adapter", "last.safetensors"):
        assert word in messages.text.replace("networks.lora", "adapter")


def test_events_and_summary(arguments, tmp_path, messages):
    outcome = run_training("sd", arguments())
    log = events(tmp_path / "out")
    assert [event["event"] for event in log] == ["start", *["step"] * 4, "saved", "end"]
    assert [event["loss"] for event in log if event["event"] == "step"] == list(outcome.losses)
    with Image.open(tmp_path / "out" / "last_loss.png") as plot:
        assert plot.size[0] > 500
    assert "last_loss.png" in messages.text and "use it" in messages.text


def test_tensorboard(arguments, tmp_path):
    run_training("sd", arguments("--logging_dir", str(tmp_path / "logs"), "--log_prefix", "try_"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("try_")
    accumulator = EventAccumulator(str(folder / "network_train"))
    accumulator.Reload()
    tags = set(accumulator.Tags()["scalars"])
    assert {"loss/current", "loss/average", "lr/textencoder", "lr/unet", "norm/grad"} <= tags
    assert [event.step for event in accumulator.Scalars("loss/current")] == [1, 2, 3, 4]


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_samples(family, arguments, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat --w 100 --h 64 --d 7 --s 2\n\na dog --w 64 --h 64 --s 2 --l 3 --n blurry\n")
    given = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "2", "--sample_at_first")
    with_samples = run_training(family, arguments(*given, family=family))
    images = sorted(path for path in (tmp_path / "out" / "sample").iterdir() if "sheet" not in path.name)
    assert len(images) == 6
    assert images[0].name.startswith("last_000002_00_") and images[0].name.endswith("_7.png")
    with Image.open(images[0]) as image:
        assert image.size == (96, 64)
        assert json.loads(image.text["sample_request"])["prompt"] == "a cat"
    # training does not notice that images were made
    assert run_training(family, arguments(family=family)).losses == with_samples.losses


def test_samples_are_repeatable_and_follow_the_adapter(arguments, tmp_path):
    prompts = tmp_path / "prompts.json"
    prompts.write_text(
        json.dumps(["a cat --w 64 --h 64 --s 2", {"prompt": "a cat", "width": 64, "height": 64, "sample_steps": 2}])
    )
    pixels = []
    for run in ("a", "b"):
        given = arguments("--sample_prompts", str(prompts), "--sample_every_n_steps", "4", "--sample_at_first")
        given[given.index("--output_dir") + 1] = str(tmp_path / run)
        run_training("sd", [*given, "--learning_rate", "1e-1"])
        files = sorted(path for path in (tmp_path / run / "sample").iterdir() if "sheet" not in path.name)
        pixels.append([Image.open(file).tobytes() for file in files])
    assert pixels[0] == pixels[1]
    assert pixels[0][0] != pixels[0][2]  # after the last step, at first


SAMPLERS = [
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
    "ddpm",
]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_brings_noise_to_the_image(name):
    """With a model that knows the answer, every sampler ends near it; DDIM is the yardstick."""
    from library.diffusion.ddpm import alphas_cumprod
    from library.sampling.samplers import make_scheduler, run_scheduler

    answer = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)

    def predict(noisy, times):
        index = times.float().clamp(0, 999).round().long()
        signal = alphas_cumprod()[index].view(-1, 1, 1, 1)
        return (noisy - signal.sqrt() * answer) / (1 - signal).sqrt().clamp(min=1e-3)

    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    result = run_scheduler(make_scheduler(name), predict, noise, 12, torch.Generator().manual_seed(0))
    assert (result - answer).abs().mean() < 0.35


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "euler_a", "dpmsolver++"])
def test_samplers_follow_a_zero_terminal_schedule_of_velocities(name):
    """They begin where nothing of the image is left, as training does."""
    from library.diffusion.ddpm import alphas_cumprod
    from library.sampling.samplers import make_scheduler, run_scheduler

    answer = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    signals = alphas_cumprod(zero_terminal=True)
    seen = []

    def predict(noisy, times):
        seen.append(float(times[0]))
        signal = signals[times.float().clamp(0, 999).round().long()].view(-1, 1, 1, 1)
        noise = (noisy - signal.sqrt() * answer) / (1 - signal).sqrt()
        return signal.sqrt() * noise - (1 - signal).sqrt() * answer

    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler(name, velocity=True, zero_terminal=True)
    result = run_scheduler(scheduler, predict, noise, 12, torch.Generator().manual_seed(0))
    assert seen[0] == pytest.approx(999, abs=1)
    assert (result - answer).abs().mean() < 0.35


def test_samplers_that_cannot_follow_it_say_so():
    from library.sampling.samplers import make_scheduler

    with pytest.raises(UserError, match="zero_terminal_snr"):
        make_scheduler("lms", zero_terminal=True)


def test_validation_is_the_same_whatever_training_drew(arguments):
    data = {"dataset": "validation_split = 0.3\nvalidation_seed = 5"}
    first = run_training("sd", arguments("--validate_at_first", "--validate_every_n_steps", "2", **data))
    other = run_training("sd", arguments("--validate_at_first", "--learning_rate", "1e-9", "--seed", "1", **data))
    assert [step for step, _ in first.validation] == [0, 2, 4]
    assert [step for step, _ in other.validation] == [0, 4]
    # the noise follows the seed of the run unless a validation seed is given on the command line
    assert other.validation[0][1] == pytest.approx(other.validation[-1][1], rel=1e-4)
    assert first.validation[0][1] != first.validation[-1][1]
    without = run_training("sd", arguments(**data))
    assert without.losses == first.losses


def test_validation_works_with_fixed_times_in_flow_families(arguments):
    data = {"dataset": "validation_split = 0.2"}
    runs = [
        run_training("flux", arguments("--validate_at_first", *extra, family="flux", **data)).validation[0][1]
        for extra in ((), ("--timestep_sampling", "uniform"), ("--cache_latents",))
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6) == pytest.approx(runs[2], rel=1e-6)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_bf16(family, arguments, tmp_path):
    plain = run_training(family, arguments(family=family))
    mixed = run_training(family, arguments("--mixed_precision", "bf16", family=family))
    assert mixed.losses == pytest.approx(plain.losses, rel=0.03)
    assert mixed.losses != plain.losses
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "last.safetensors").values()} == {torch.float32}


def test_fp16_needs_a_device_that_has_it(arguments):
    with pytest.raises(UserError, match="the CPU cannot train in fp16"):
        run_training("sd", arguments("--mixed_precision", "fp16"))


def test_8bit_adam(arguments):
    plain = run_training("sd", arguments())
    small = ("--optimizer_type", "AdamW8bit", "--optimizer_args", "min_8bit_size=16")
    eight = run_training("sd", arguments(*small))
    assert eight.losses[0] == plain.losses[0]
    assert eight.losses == pytest.approx(plain.losses, rel=0.02)
    assert eight.losses != plain.losses


def test_adafactor_with_its_own_rate(arguments, tmp_path):
    outcome = run_training("sd", arguments("--optimizer_type", "Adafactor"))
    rates = [event["lr/unet"] for event in events(tmp_path / "out") if event["event"] == "step"]
    assert outcome.losses[0] != outcome.losses[-1]
    assert rates[-1] > 0


def test_lycoris_trains_and_saves(arguments, tmp_path):
    more = ("--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "factor=4", "--network_dropout", "0.1")
    run_training("sd", arguments(*more))
    tensors = load_file(tmp_path / "out" / "last.safetensors")
    assert any(name.startswith("lora_unet_down_blocks_0_attentions_0") and "lokr_w" in name for name in tensors)
    assert any(name.startswith("lora_te_text_model_encoder_layers_0") for name in tensors)
    assert "lokr" in read_header(tmp_path / "out" / "last.safetensors")[1]["ss_network_args"]


def test_going_on_from_weights(arguments, tmp_path):
    """`--network_weights` starts where the file ends; `--dim_from_weights` takes its ranks."""
    run_training("sd", arguments("--learning_rate", "1e-2"))
    first = tmp_path / "first.safetensors"
    (tmp_path / "out" / "last.safetensors").rename(first)
    before = load_file(first)
    run_training("sd", arguments("--network_weights", str(first), "--learning_rate", "1e-12"))
    after = load_file(tmp_path / "out" / "last.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    run_training("sd", arguments("--network_weights", str(first), "--dim_from_weights", "--network_dim", "9"))
    assert load_file(tmp_path / "out" / "last.safetensors").keys() == before.keys()


def test_base_weights_are_merged(arguments, tmp_path):
    """Training on a merged adapter begins with the loss of a model that has it."""
    run_training("sd", arguments("--learning_rate", "1e-1"))
    first = tmp_path / "first.safetensors"
    (tmp_path / "out" / "last.safetensors").rename(first)
    plain = run_training("sd", arguments("--max_train_steps", "1")).losses[0]
    applied = run_training("sd", arguments("--max_train_steps", "1", "--network_weights", str(first))).losses[0]
    merged = run_training("sd", arguments("--max_train_steps", "1", "--base_weights", str(first))).losses[0]
    half = ("--base_weights", str(first), "--base_weights_multiplier", "0.5")
    assert merged == pytest.approx(applied, rel=1e-4)
    assert abs(merged - plain) > 1e-3
    assert run_training("sd", arguments("--max_train_steps", "1", *half)).losses[0] not in (merged, plain)


def test_scale_weight_norms(arguments, tmp_path):
    run_training("sd", arguments("--learning_rate", "1", "--scale_weight_norms", "0.1"))
    log = [event for event in events(tmp_path / "out") if event["event"] == "step"]
    assert log[0]["max_norm/keys_scaled"] > 0
    assert log[-1]["max_norm/max_key_norm"] <= 0.1 + 1e-6


def test_learning_rates_and_schedule(arguments, tmp_path):
    more = ("--unet_lr", "2e-3", "--text_encoder_lr", "1e-4", "--lr_scheduler", "cosine", "--lr_warmup_steps", "0.5")
    run_training("sd", arguments(*more))
    log = [event for event in events(tmp_path / "out") if event["event"] == "step"]
    assert [event["lr/unet"] for event in log] == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])
    assert [event["lr/textencoder"] for event in log] == pytest.approx([0.0, 5e-5, 1e-4, 5e-5])


def test_compiled_blocks_train_the_same(arguments):
    """Two bucket sizes through compiled, checkpointed blocks with adapters."""
    more = ("--network_train_unet_only", "--gradient_checkpointing")
    plain = run_training("flux", arguments(*more, family="flux"))
    compiled = run_training(
        "flux",
        arguments(*more, "--compile", "--compile_backend", "eager", "--compile_dynamic", "true", family="flux"),
    )
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


def test_time_ranges(arguments, tmp_path):
    record = tmp_path / "record"
    more = ("--min_timestep", "200", "--max_timestep", "300", "--record_steps", str(record))
    for family, folder in (("sd", "a"), ("flux", "b")):
        given = [*arguments(*more, family=family)]
        given[given.index("--record_steps") + 1] = str(tmp_path / folder)
        run_training(family, given)
        lines = [json.loads(line) for line in (tmp_path / folder / "steps.jsonl").read_text().splitlines()]
        times = [t for line in lines for t in line["timesteps"]]
        assert all(200 <= t <= 300 for t in times)
        assert len(set(times)) > 1


def test_record_has_what_design_says(arguments, tmp_path):
    run_training("flux", arguments("--record_steps", str(tmp_path / "r"), family="flux", batch_size=2))
    line = json.loads((tmp_path / "r" / "steps.jsonl").read_text().splitlines()[0])
    expected = (
        "step epoch image_keys subset captions loss loss_weights flipped pixel_crop original_sizes_hw crop_top_lefts "
        "target_sizes_hw text_drop lr"
    )
    assert set(expected.split()) <= set(line)
    assert len(line["image_keys"]) == len(line["pixel_crop"]) == len(line["subset"])
    tensors = load_file(tmp_path / "r" / "step_000000.safetensors")
    assert set(tensors) == {"latents", "noise", "noisy", "timesteps", "sigmas"}
    meta = json.loads((tmp_path / "r" / "meta.json").read_text())
    assert (meta["format"], meta["family"], meta["task"], meta["seed"]) == (1, "flux", "network", 42)
    with pytest.raises(UserError, match="holds a record already"):
        run_training("flux", arguments("--record_steps", str(tmp_path / "r"), family="flux"))


def test_two_families_in_one_process(arguments, tmp_path):
    started = time.time()
    assert run_training("sd", arguments()).state.step == 4
    assert run_training("flux", arguments(family="flux")).state.step == 4
    assert time.time() - started < 120


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_image_that_breaks_while_training_is_named(arguments, inputs, tmp_path, workers):
    """Header and end are right, so only reading it shows; from a worker process too it is one line, not a traceback."""
    folder = tmp_path / "broken"
    folder.mkdir()
    data = (inputs.folder / "data" / "img" / "cat.png").read_bytes()
    middle = len(data) // 2
    (folder / "cat.png").write_bytes(data[:middle] + bytes(2000) + data[middle + 2000 :])
    (folder / "cat.txt").write_text("a cat")
    given = arguments("--max_data_loader_n_workers", workers)
    config = tmp_path / "dataset.toml"
    config.write_text(config.read_text().replace(str(inputs.folder / "data" / "img"), str(folder)))
    with pytest.raises(UserError, match="cat.png: cannot be decoded") as error:
        run_training("sd", given)
    assert "\n" not in str(error.value)


def test_memory_is_estimated_before_loading(arguments, messages):
    run_training("flux", arguments("--dry_run", family="flux"))
    line = next(text for text in messages.text.splitlines() if "weights" in text and "transformer" in text)
    assert "T5" in line and "VAE" in line and "CLIP-L" in line


def test_lycoris_on_flux(arguments, tmp_path):
    more = ("--network_module", "lycoris.kohya", "--network_args", "algo=loha", "preset=attn-mlp")
    run_training("flux", arguments(*more, "--network_train_unet_only", "--cache_text_encoder_outputs", family="flux"))
    names = load_file(tmp_path / "out" / "last.safetensors")
    assert any(name.startswith("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a") for name in names)


def test_checkpointing_and_compiling_really_happen(arguments, monkeypatch):
    """The equalities above would hold as well if the flags did nothing."""
    from library.training import build

    wrapped = []
    real = build.checkpointed
    monkeypatch.setattr(
        build, "checkpointed", lambda block, **kw: wrapped.append(type(block).__name__) or real(block, **kw)
    )
    run_training("flux", arguments("--max_train_steps", "1", family="flux"))
    assert not wrapped
    torch._dynamo.utils.counters.clear()
    more = ("--gradient_checkpointing", "--compile", "--compile_backend", "eager", "--compile_dynamic", "true")
    run_training("flux", arguments("--max_train_steps", "1", *more, family="flux"))
    assert set(wrapped) == {"DoubleStreamBlock", "SingleStreamBlock", "CLIPEncoderLayer"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    wrapped.clear()
    run_training("sd", arguments("--max_train_steps", "1", "--gradient_checkpointing"))
    assert set(wrapped) == {"ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer"}


def test_another_vae(arguments, inputs, tmp_path):
    """`--vae` replaces the checkpoint's own; bare and whole-checkpoint names are read."""
    own = {
        name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(inputs.model("sd15")).items()
        if name.startswith("first_stage_model.")
    }
    plain = run_training("sd", arguments("--max_train_steps", "1")).losses
    save_file_atomic(own, tmp_path / "same.safetensors")
    assert (
        run_training("sd", arguments("--max_train_steps", "1", "--vae", str(tmp_path / "same.safetensors"))).losses
        == plain
    )
    own["encoder.conv_in.weight"] = own["encoder.conv_in.weight"] * 1.5
    save_file_atomic(
        {f"first_stage_model.{name}": tensor for name, tensor in own.items()}, tmp_path / "other.safetensors"
    )
    other = run_training("sd", arguments("--max_train_steps", "1", "--vae", str(tmp_path / "other.safetensors"))).losses
    assert other != plain


def test_what_is_cached_is_let_go(arguments, monkeypatch):
    """Encoders and VAE do not stay in memory once their outputs are known."""
    from library.training import run

    sessions = []
    real = run.build_session

    def build(*given):
        sessions.append(real(*given))
        return sessions[-1]

    monkeypatch.setattr(run, "build_session", build)
    cached = ("--cache_latents", "--cache_text_encoder_outputs")
    run_training("flux", arguments(*cached, "--network_train_unet_only", family="flux"))
    run_training("flux", arguments(*cached, family="flux"))
    whole, partly = (session.components for session, _ in sessions)
    assert whole.text_encoders == [None, None] and whole.vae is None
    assert partly.text_encoders[0] is not None and partly.text_encoders[1] is None


def test_dropouts_rest_while_validating(arguments, tmp_path):
    """The last validation of a run with dropout is the first one of a run that goes on from its file."""
    data = {"dataset": "validation_split = 0.3\nvalidation_seed = 5"}
    first = run_training("sd", arguments("--network_dropout", "0.5", "--learning_rate", "1e-2", **data))
    saved = tmp_path / "saved.safetensors"
    (tmp_path / "out" / "last.safetensors").rename(saved)
    more = ("--network_weights", str(saved), "--validate_at_first", "--max_train_steps", "1")
    again = run_training("sd", arguments(*more, **data))
    assert again.validation[0][1] == pytest.approx(first.validation[-1][1], rel=1e-5)


def test_a_dry_run_finds_what_a_run_would(arguments, inputs, tmp_path):
    """Network, optimizer, adapter files and output folder are looked at before weights load, and reported together."""
    (tmp_path / "file").write_text("")
    more = ("--network_args", "conv_dimm=4", "--optimizer_args", "nonsense=1", "--dry_run")
    given = arguments(*more)
    given[given.index("--output_dir") + 1] = str(tmp_path / "file" / "out")
    with pytest.raises(UserError) as error:
        run_training("sd", given)
    found = str(error.value)
    assert "unknown key 'conv_dimm'; did you mean conv_dim?" in found
    assert "--optimizer_args" in found and "does not take these" in found
    assert "--output_dir" in found and "is a file" in found


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--network_module", "networks.nowhere"), "--network_module = 'networks.nowhere': cannot be imported"),
        (("--network_weights", "none.safetensors"), "--network_weights = 'none.safetensors': no such file"),
        (("--base_weights", "none.safetensors"), "--base_weights = 'none.safetensors': no such file"),
        (("--lr_warmup_steps", "5"), "use constant_with_warmup"),
    ],
)
def test_a_dry_run_finds_each(arguments, more, text):
    with pytest.raises(UserError) as error:
        run_training("sd", arguments(*more, "--dry_run"))
    assert text in str(error.value)
