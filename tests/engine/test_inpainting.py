"""Training of models that see a mask and what is kept of the image."""

import pytest
import torch
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import CheckpointError, UserError
from library.base.safetensors_io import load_file, save_file_atomic
from library.diffusion.inpainting import draw_mask
from library.modules.components import Need
from library.sd_utils import load_unet, open_checkpoint


def masks(count=200, size=(64, 48)):
    return torch.stack([draw_mask(torch.Generator().manual_seed(n), size) for n in range(count)])


def test_masks_are_of_many_kinds_and_repeatable():
    drawn = masks()
    assert drawn.shape == (200, 64, 48) and set(drawn.unique().tolist()) == {0.0, 1.0}
    shares = drawn.mean((1, 2))
    assert float((shares > 0.02).float().mean()) > 0.95 and float(shares.max()) < 0.95
    assert 0.15 < float(shares.mean()) < 0.6 and float(shares.std()) > 0.1
    assert torch.equal(drawn, masks()) and len({tuple(mask.flatten().tolist()) for mask in drawn}) > 190
    # rectangles are their own bounding box, clouds are not
    boxes = [mask[mask.any(1).nonzero()[0] : mask.any(1).nonzero()[-1] + 1].mean() for mask in drawn]
    assert 0.1 < sum(float(box) > 0.6 for box in boxes) / 200 < 0.9


@pytest.fixture
def arguments(inputs, tmp_path):
    def make(*more, folder="run"):
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        toml = dataset_toml(place, inputs, batch_size=2)
        return [*network_arguments("sd", inputs, place, toml, "--train_inpainting"), *more]

    return make


def nine_channels(inputs, tmp_path):
    tensors = load_file(inputs.model("sd15"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    more = torch.randn(tensors[first].shape[0], 5, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.1
    tensors[first] = torch.cat((tensors[first], more), dim=1)
    save_file_atomic(tensors, tmp_path / "inpainting.safetensors", {})
    return str(tmp_path / "inpainting.safetensors")


def test_a_model_without_the_channels_begins_as_it_was(inputs):
    file = open_checkpoint(inputs.model("sd15"))
    plain, wider = load_unet(file, Need()), load_unet(file, Need(), inpainting=True)
    x, extra, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8, 8), torch.randn(1, 77, 64)
    with torch.no_grad():
        expected = plain(x, torch.tensor([5]), text).sample
        assert torch.equal(wider(torch.cat((x, extra), 1), torch.tensor([5]), text).sample, expected)


def test_a_run_sees_what_is_kept(arguments, inputs, tmp_path):
    """The mask's channel is 0 or 1; the latents of what is kept differ from the image's where it is masked."""
    model = nine_channels(inputs, tmp_path)
    more = ("--pretrained_model_name_or_path", model, "--record_steps", str(tmp_path / "record"))
    outcome = run_training("sd", arguments(*more))
    step = load_file(tmp_path / "record" / "step_000000.safetensors")
    mask, kept = step["extra"][:, :1], step["extra"][:, 1:]
    assert set(mask.unique().tolist()) == {0.0, 1.0} and kept.shape == step["latents"].shape
    difference = (kept - step["latents"]).abs().mean(1, keepdim=True)
    assert float(difference[mask == 1].mean()) > float(difference[mask == 0].mean())
    again = run_training("sd", arguments(*more[:2], "--replay_steps", str(tmp_path / "record"), folder="replayed"))
    assert again.losses == outcome.losses
    assert run_training("sd", arguments(*more[:2], folder="same")).losses == outcome.losses


def test_samples_are_made_from_nothing(arguments, inputs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    more = ("--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_at_first", "--max_train_steps", "1")
    run_training("sd", arguments(*more))
    assert list((tmp_path / "run" / "out" / "sample").glob("*.png"))


def test_what_cannot_be(arguments, inputs, tmp_path):
    with pytest.raises(UserError, match="--train_inpainting: cannot be combined with cached latents"):
        run_training("sd", arguments("--cache_latents"))
    model = nine_channels(inputs, tmp_path)
    plain = [one for one in arguments() if one != "--train_inpainting"]
    with pytest.raises((CheckpointError, UserError), match="inpainting model .9 channels.; add --train_inpa"):
        run_training("sd", [*plain, "--pretrained_model_name_or_path", model])
