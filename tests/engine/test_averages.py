"""Averaged weights and the best result: what a run with them leaves behind."""

import os
import signal

import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.safetensors_io import load_file, read_header
from library.training.state import TrainState

SPLIT = "validation_split = 0.3\nvalidation_seed = 5"


@pytest.fixture
def run(inputs, tmp_path):
    def make(name, *more, family="sd", **dataset):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        toml = dataset_toml(folder, inputs, **dataset)
        return run_training(family, network_arguments(family, inputs, folder, toml, *more)), folder / "out"

    return make


def test_an_average_lies_beside_every_result_and_follows_the_formula(run):
    more = ("--save_every_n_steps", "1", "--save_last_n_steps", "2", "--max_train_steps", "5")
    plain, plain_out = run("plain", *more)
    outcome, out = run("averaged", *more, "--ema_decay", "0.5", "--ema_no_warmup", "--ema_device", "cpu")
    assert outcome.losses == plain.losses  # the average changes nothing that is trained
    names = sorted(path.name for path in out.glob("*.safetensors"))
    steps = [f"last-step0000000{n}" for n in (3, 4, 5)]
    assert names == sorted(f"{name}{end}.safetensors" for name in (*steps, "last") for end in ("", "-ema"))
    before, after, average = (
        load_file(out / f"{name}.safetensors") for name in ("last-step00000004-ema", "last-step00000005", "last-ema")
    )
    for name, value in average.items():
        assert torch.allclose(value, 0.5 * before[name] + 0.5 * after[name], atol=1e-7)
    metadata = read_header(out / "last-ema.safetensors")[1]
    assert metadata["ss_ema_decay"] == "0.5" and metadata["ss_steps"] == "5"
    assert "ss_ema_decay" not in read_header(plain_out / "last.safetensors")[1]
    assert torch.equal(load_file(out / "last.safetensors")["lora_unet_mid_block_attentions_0_proj_in.alpha"],
                       average["lora_unet_mid_block_attentions_0_proj_in.alpha"])  # fmt: skip


def test_samples_and_validation_look_at_either(run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    more = ("--sample_prompts", str(prompts), "--sample_every_n_steps", "4", "--validate_every_n_steps", "4")
    data = {"dataset": SPLIT}
    pictures, losses = {}, {}
    for kind in ("trained", "ema", "both"):
        averaged = ("--ema_decay", "0.9", "--ema_no_warmup", "--ema_samples", kind, "--learning_rate", "1e-2")
        _, out = run(kind, *more, *averaged, **data)
        pictures[kind] = {
            path.name.rsplit("_", 2)[0]: path.read_bytes() for path in (out / "sample").glob("last_0*.png")
        }
        losses[kind] = {
            event["event"]: event["loss"] for event in events(out) if event["event"].startswith("validation")
        }
    assert set(pictures["both"]) == {"last_000004_00", "last_000004_ema_00"}
    assert losses["both"]["validation"] == losses["trained"]["validation"]
    assert losses["both"]["validation_ema"] == losses["ema"]["validation"] != losses["trained"]["validation"]


def test_validation_says_where_the_loss_comes_from(run):
    _, out = run("levels", "--validate_every_n_steps", "2", dataset=SPLIT)
    found = [event for event in events(out) if event["event"] == "validation"]
    assert [event["step"] for event in found] == [2, 4]
    for event in found:
        levels = event["by_timestep"]
        assert list(levels) == ["200", "400", "600", "800"]
        assert sum(levels.values()) / 4 == pytest.approx(event["loss"], rel=1e-6)
        assert event["by_dataset"] == {"0": pytest.approx(event["loss"], rel=1e-6)}


def test_the_best_result_is_kept(run):
    """A rate that ruins the model: the best result is an early one, and stays it."""
    more = ("--validate_every_n_steps", "1", "--save_best", "--validate_at_first", "--max_train_steps", "6")
    outcome, out = run("best", *more, "--learning_rate", "0.3", "--save_every_n_steps", "1", dataset=SPLIT)
    trained = {step: loss for step, loss in outcome.validation if step}
    best = min(trained, key=trained.get)
    assert best < 6
    kept = out / "last-best.safetensors"
    assert read_header(kept)[1]["ss_steps"] == str(best)
    same = load_file(out / f"last-step{best:08d}.safetensors")
    assert all(torch.equal(value, same[name]) for name, value in load_file(kept).items())


EVERYTHING = (
    *("--ema_decay", "0.9", "--ema_samples", "both", "--optimizer_type", "AdamWScheduleFree"),
    *("--gradient_accumulation_steps", "2", "--max_data_loader_n_workers", "2", "--network_dropout", "0.1"),
    *("--validate_every_n_steps", "2", "--save_best", "--sample_every_n_steps", "2", "--save_every_n_steps", "2"),
    *("--noise_offset", "0.1", "--multires_noise_iterations", "3", "--num_timestep_buckets", "5", "--save_state"),
)


@pytest.mark.parametrize("family", ["flux"])
def test_a_run_with_everything_resumed_equals_one_that_was_never_stopped(run, tmp_path, family, monkeypatch):
    """Stopped by a signal in the middle of an epoch, between two saves."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    data = {"dataset": SPLIT, "batch_size": 2, "subset": "flip_aug = true\nshuffle_caption = true\n"}
    more = (*EVERYTHING, "--sample_prompts", str(prompts), "--max_train_steps", "8")
    straight, straight_out = run("straight", *more, family=family, **data)
    advance = TrainState.advance

    def signalled(state, window):
        advance(state, window)
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TrainState, "advance", signalled)
        stopped, _ = run("stopped", *more, family=family, **data)
    assert stopped.state.step == 5 and stopped.exit_code == 128 + signal.SIGTERM
    resumed, out = run("stopped", *more, "--resume", "auto", family=family, **data)
    assert resumed.state.step == 8
    assert list(straight.losses)[5:] == list(resumed.losses)[-3:]
    assert straight.validation[-2:] == resumed.validation[-2:]
    for name in ("last", "last-ema", "last-best", "last-step00000006", "last-step00000006-ema"):
        theirs, ours = (load_file(place / f"{name}.safetensors") for place in (straight_out, out))
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items()), name
    for end in ("000006", "000006_ema", "000008"):
        first, second = (sorted((place / "sample").glob(f"last_{end}_00_*"))[0] for place in (straight_out, out))
        assert first.read_bytes() == second.read_bytes()
