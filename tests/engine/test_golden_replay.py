"""Recorded runs of the reference, replayed from their inputs."""

import json

import pytest
from support.runs import FAMILY_OF, Case, events, run_training

from library.base.safetensors_io import load_file, read_header

CASES = [
    "sd15_lora_mask",
    "sd15_opt_huber_sched",
    "sd15_opt_multires_vlike",
    "sd15_opt_vpred_zsnr",
    "sd15_opt_polynomial_accum",
    "sd2_lora_b2_cache",
    "sdxl_lora_b1",
    "sd3_lora_b1",
    "sd35_lora_b2_cache_disk",
    "sdxl_lora_b2_cache_disk",
    "flux_lora_dims_weighting",
    "flux_lora_flux_shift_t5lora",
    "sd15_lora_b1",
    "sd15_lora_b2_cache_disk",
    "sd15_lora_conv_te_lr",
    "sd15_opt_adafactor",
    "flux_lora_b1",
    "flux_lora_b2_cache_te_shift",
    "chroma_lora_b1",
    "anima_lora_b1",
    "hunyuan_lora_b1_fp32",
    "lumina_lora_b1",
]


@pytest.fixture(scope="module", params=CASES)
def replayed(request, inputs, tmp_path_factory):
    case = Case(request.param)
    work = tmp_path_factory.mktemp(case.name)
    script, arguments = case.script_and_arguments(inputs, work)
    run_training(FAMILY_OF[script], arguments)
    return case, work


@pytest.mark.golden
def test_losses(replayed):
    case, work = replayed
    ours = [json.loads(line) for line in (work / "steps" / "steps.jsonl").read_text().splitlines()]
    theirs = case.lines()
    assert [line["image_keys"] for line in ours] == [line["image_keys"] for line in theirs]
    relative = [abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    assert max(relative[:3]) < 1e-5
    assert max(relative) < 1e-4


@pytest.mark.golden
def test_gradient_norms(replayed):
    case, work = replayed
    ours = [event["norm/grad"] for event in events(work / "out") if event["event"] == "step"]
    assert ours == pytest.approx(case.grad_norms(), rel=1e-3)


@pytest.mark.golden
def test_update(replayed):
    case, work = replayed
    start, end, ours = case.tensors("init"), case.tensors("final"), load_file(work / "out" / "last.safetensors")
    assert set(ours) == set(end)
    error = sum(float((ours[name] - end[name]).square().sum()) for name in end) ** 0.5
    moved = sum(float((end[name] - start[name]).square().sum()) for name in end) ** 0.5
    assert error <= 0.02 * moved


@pytest.mark.golden
def test_metadata(replayed):
    """Same keys as the reference's file, and the same values where the run decides them."""
    case, work = replayed
    theirs = read_header(case.folder / "final.safetensors")[1]
    ours = read_header(work / "out" / "last.safetensors")[1]
    assert set(theirs) <= set(ours) | {"ss_sd_scripts_commit_hash"}
    differs = {key for key in theirs if ours.get(key) != theirs[key]}
    expected = {
        "ss_session_id",
        "ss_training_started_at",
        "ss_training_finished_at",
        "ss_sd_scripts_commit_hash",
        "sshs_model_hash",
        "sshs_legacy_hash",  # of 64 KiB of the weights, in files that are long enough
        "modelspec.date",
        "modelspec.implementation_version",
        "modelspec.resolution",  # the trained size, not a constant
        "ss_num_epochs",  # a replay has one
        "ss_epoch",
        "ss_num_batches_per_epoch",
    }
    assert differs <= expected


@pytest.mark.golden
def test_replay_needs_its_images(inputs, tmp_path):
    """A record whose images the dataset lacks is refused before weights load, and every one is named."""
    from library.base.errors import UserError

    case = Case("sd15_lora_b1")
    _, arguments = case.script_and_arguments(inputs, tmp_path)
    toml = tmp_path / "dataset.toml"
    toml.write_text(toml.read_text().replace("data/img", "data/reg"))
    with pytest.raises(UserError) as error:
        run_training("sd", arguments)
    assert "astronaut.png" in str(error.value)
    assert "coffee.jpg" in str(error.value)


@pytest.mark.golden
def test_replay_refuses_other_shapes(inputs, tmp_path):
    from library.base.errors import UserError

    case = Case("sd15_lora_b1")
    _, arguments = case.script_and_arguments(inputs, tmp_path)
    toml = tmp_path / "dataset.toml"
    toml.write_text(toml.read_text().replace("resolution = 128", "resolution = 192"))
    with pytest.raises(UserError, match="recorded latents are"):
        run_training("sd", arguments)


@pytest.mark.golden
@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_lora_b1", "sd15_lora_b2_cache_disk"])
def test_compiled_blocks_give_the_recorded_losses(name, inputs, tmp_path):
    """With the real compiler; its first time takes minutes for the many shapes of a U-Net."""
    case = Case(name)
    script, arguments = case.script_and_arguments(inputs, tmp_path)
    arguments[arguments.index("--max_train_steps") + 1] = "4"
    outcome = run_training(FAMILY_OF[script], [*arguments, "--compile"])
    assert list(outcome.losses) == pytest.approx([line["loss"] for line in case.lines()[:4]], rel=1e-4)
