"""What must not change a result: checkpointing, caching, workers, how a batch is cut."""

import pytest
import torch
from support.runs import dataset_toml, events, network_arguments, run_training

from library.base.safetensors_io import load_file

FAMILIES = ["sd", "flux"]


def result(family, inputs, folder, *more, batch_size=2, subset="", dataset=""):
    folder.mkdir(exist_ok=True)
    toml = dataset_toml(folder, inputs, batch_size=batch_size, subset=subset, dataset=dataset)
    outcome = run_training(family, network_arguments(family, inputs, folder, toml, *more))
    return outcome, load_file(folder / "out" / "last.safetensors")


def assert_same(first, second):
    (outcome_a, tensors_a), (outcome_b, tensors_b) = first, second
    assert outcome_a.losses == outcome_b.losses
    assert set(tensors_a) == set(tensors_b)
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)


FLIPPED = "flip_aug = true\nshuffle_caption = true\ncaption_dropout_rate = 0.2\n"


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request, inputs, tmp_path_factory):
    """A run that reads images as it goes, with everything random that data can have."""
    folder = tmp_path_factory.mktemp("plain")
    return request.param, result(request.param, inputs, folder, "--network_dropout", "0.1", subset=FLIPPED)


def test_same_seed_same_result(plain, inputs, tmp_path):
    family, expected = plain
    assert_same(expected, result(family, inputs, tmp_path, "--network_dropout", "0.1", subset=FLIPPED))


def test_another_seed_another_result(plain, inputs, tmp_path):
    family, expected = plain
    other = result(family, inputs, tmp_path, "--network_dropout", "0.1", "--seed", "43", subset=FLIPPED)
    assert expected[0].losses != other[0].losses


def test_four_workers(plain, inputs, tmp_path):
    family, expected = plain
    more = ("--network_dropout", "0.1", "--max_data_loader_n_workers", "4")
    assert_same(expected, result(family, inputs, tmp_path, *more, subset=FLIPPED))


def test_cached_posterior_samples(inputs, tmp_path):
    """A drawn latent belongs to its image, so a cache of it changes nothing; it differs from the mode."""
    drawn = result("sd", inputs, tmp_path / "a", "--vae_sample")
    assert_same(drawn, result("sd", inputs, tmp_path / "b", "--vae_sample", "--cache_latents"))
    assert drawn[0].losses != result("sd", inputs, tmp_path / "c")[0].losses


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_or_accumulation(family, inputs, tmp_path):
    """A batch of four against four of one: on the same step inputs the update is the same.

    Items carry their own noise, so only the order of images has to agree; one bucket with four images makes it so.
    """
    data = tmp_path / "four"
    data.mkdir()
    for name in ("astronaut", "cat", "coins", "flower"):
        for suffix in (".png", ".txt"):
            (data / f"{name}{suffix}").write_bytes((inputs.folder / "data" / "img" / f"{name}{suffix}").read_bytes())
    results = []
    for size, steps in ((4, 1), (1, 4)):
        folder = tmp_path / str(size)
        folder.mkdir()
        toml = folder / "dataset.toml"
        toml.write_text(
            f"[[datasets]]\nresolution = 64\nbatch_size = {size}\n"
            f"[[datasets.subsets]]\nimage_dir = '{data}'\ncaption_extension = '.txt'\n"
        )
        more = ("--gradient_accumulation_steps", str(steps), "--max_train_steps", "3")
        outcome = run_training(family, network_arguments(family, inputs, folder, toml, *more))
        norms = [event["norm/grad"] for event in events(folder / "out") if event["event"] == "step"]
        results.append((outcome.losses, norms, load_file(folder / "out" / "last.safetensors")))
    (losses_a, norms_a, a), (losses_b, norms_b, b) = results
    assert losses_a == pytest.approx(losses_b, rel=1e-5)
    assert norms_a == pytest.approx(norms_b, rel=1e-5)
    # Adam makes a whole step of a gradient near zero whatever its size, so single weights may differ more
    error = sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5
    assert error <= 1e-3 * sum(float(a[name].square().sum()) for name in a if "lora_up" in name) ** 0.5


def test_replay_takes_captions_from_the_record(inputs, tmp_path):
    """Shuffled when they were recorded; the replay caches the texts of the record, not of the files."""
    record = tmp_path / "record"
    shuffled = "shuffle_caption = true"
    unet = ("--network_train_unet_only",)
    first = result("flux", inputs, tmp_path / "a", *unet, "--record_steps", str(record), batch_size=1, subset=shuffled)
    more = (*unet, "--replay_steps", str(record), "--cache_text_encoder_outputs")
    again = result("flux", inputs, tmp_path / "b", *more, batch_size=1)
    assert first[0].losses == pytest.approx(again[0].losses, rel=1e-6)


def test_partly_cached_text(inputs, tmp_path):
    """CLIP is trained and encoded in every step, T5 comes from memory."""
    first = result("flux", inputs, tmp_path / "a", batch_size=1)
    cached = result("flux", inputs, tmp_path / "b", "--cache_text_encoder_outputs", batch_size=1)
    assert first[0].losses == pytest.approx(cached[0].losses, rel=1e-6)
    assert any(
        name.startswith("lora_te1_") and tensor.abs().sum() > 0 for name, tensor in cached[1].items() if "up" in name
    )
