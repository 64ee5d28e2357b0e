"""The preview of noise levels."""

import math

import pytest
from PIL import Image
from support.runs import dataset_toml, network_arguments, run_training

from library.base.errors import UserError
from library.diffusion.ddpm import Ddpm, SnrWeights
from library.diffusion.flow import RectifiedFlow
from library.diffusion.preview import preview_levels, preview_lines


def test_shares_are_those_of_the_distribution():
    even = preview_levels(Ddpm(min_timestep=250, max_timestep=750), (64, 64))
    assert even.shares[:5] == [0.0] * 5 and even.shares[15:] == [0.0] * 5
    assert even.shares[5:15] == pytest.approx([0.1] * 10, abs=0.015)
    normal = preview_levels(RectifiedFlow(sampling="sigmoid"), (64, 64))
    assert sum(normal.shares[:10]) == pytest.approx(0.5, abs=0.02) and sum(normal.shares) == pytest.approx(1)
    moved = preview_levels(RectifiedFlow(sampling="sigmoid"), (64, 64), offset=math.log(3))
    assert sum(moved.shares[:10]) == pytest.approx(0.136, abs=0.02)  # P(normal < -ln 3)
    assert sum(preview_levels(RectifiedFlow(sampling="flux_shift"), (128, 128)).shares[:10]) < 0.2


def test_weights_are_those_of_the_loss():
    flow = preview_levels(RectifiedFlow(sampling="uniform", weighting_scheme="sigma_sqrt", weighted=True), (8, 8))
    assert flow.weights[10] == pytest.approx(1 / 0.525**2, rel=0.1)
    snr = preview_levels(Ddpm(max_timestep=500, weights=SnrWeights(min_snr_gamma=5)), (8, 8))
    assert snr.weights[9] == pytest.approx(1.0) and snr.weights[0] < 0.15 and snr.weights[-1] is None
    text = preview_lines(snr)
    assert len(text) == 21 and text[-1].endswith("-") and "0.0%" in text[-1]


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_run_that_only_shows(family, inputs, tmp_path, messages):
    arguments = network_arguments(family, inputs, tmp_path, dataset_toml(tmp_path, inputs))
    outcome = run_training(family, [*arguments, "--show_timesteps", "image", "--show_timesteps_resolution", "512,256"])
    assert outcome.state is None and "950 - 1000" in messages.text and "stopped before training" in messages.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last_timesteps.png"]
    with Image.open(tmp_path / "out" / "last_timesteps.png") as image:
        assert image.width > 400
    with pytest.raises(UserError, match="--show_timesteps_resolution = 'x'"):
        run_training(family, [*arguments, "--show_timesteps", "console", "--show_timesteps_resolution", "x"])
