"""Noise levels of flow families."""

import math

import pytest
import torch

from library.diffusion.flow import (
    RectifiedFlow,
    discrete_sigmas,
    loss_weighting,
    resolution_shift,
    shifted,
    time_shifted,
)
from library.diffusion.noise import LevelDraw
from library.diffusion.process import fixed_timesteps
from library.strategy_flux import sampling_sigmas


def draw(flow, count=4000, size=(32, 32)):
    generators = [torch.Generator().manual_seed(n) for n in range(count)]
    timesteps, sigmas = flow.sample([LevelDraw(g) for g in generators], size)
    assert torch.allclose(timesteps, sigmas * 1000)
    return sigmas


def test_each_item_has_its_own_draw():
    flow = RectifiedFlow(sampling="sigmoid")
    alone = [flow.sample([LevelDraw(torch.Generator().manual_seed(n))], (8, 8))[1].item() for n in range(3)]
    together = flow.sample([LevelDraw(torch.Generator().manual_seed(n)) for n in range(3)], (8, 8))[1].tolist()
    assert alone == together


def test_uniform_and_sigmoid():
    assert draw(RectifiedFlow(sampling="uniform")).mean() == pytest.approx(0.5, abs=0.02)
    sigmoid = draw(RectifiedFlow(sampling="sigmoid", sigmoid_scale=0.5))
    assert sigmoid.logit().std() == pytest.approx(0.5, rel=0.05)


def test_shifts_move_the_same_draws():
    plain = draw(RectifiedFlow(sampling="sigmoid"))
    assert torch.allclose(draw(RectifiedFlow(sampling="shift", shift=3.0)), shifted(plain, 3.0))
    moved = draw(RectifiedFlow(sampling="flux_shift"), size=(64, 128))
    assert torch.allclose(moved, time_shifted(plain, resolution_shift(32 * 64)), atol=1e-6)


def test_resolution_shift_goes_through_its_points():
    assert resolution_shift(256) == pytest.approx(0.5)
    assert resolution_shift(4096) == pytest.approx(1.15)


def test_time_shift_is_the_published_formula():
    s = torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(time_shifted(s, 0.8), math.exp(0.8) / (math.exp(0.8) + (1 / s - 1)))
    assert time_shifted(torch.zeros(1), 0.8).item() == 0.0


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1024, [1, 0.84923, 0.65249, 0.38494, 0]), (4096, [1, 0.90453, 0.75951, 0.51284, 0])],
)
def test_sampling_schedule(tokens, expected):
    assert sampling_sigmas(4, tokens).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("scheme", ["uniform", "none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_discrete_draws_are_from_the_table(scheme):
    sigmas = draw(RectifiedFlow(sampling="sigma", shift=3.0, weighting_scheme=scheme), count=300)
    table = set(discrete_sigmas(3.0).tolist())
    assert set(sigmas.tolist()) <= table
    assert len(set(sigmas.tolist())) > 100


def test_logit_normal_density():
    sigmas = draw(RectifiedFlow(sampling="sigma", weighting_scheme="logit_normal", logit_mean=-1.0, logit_std=0.5))
    # the table runs from noise to data, so the drawn share is the distance from noise
    assert (1 - sigmas).logit().median() == pytest.approx(-1.0, abs=0.06)


def test_weights():
    s = torch.tensor([0.25, 1.0])
    assert loss_weighting("sigma_sqrt", s).tolist() == [16.0, 1.0]
    assert loss_weighting("cosmap", s).tolist() == pytest.approx([2 / (math.pi * 0.625), 2 / math.pi])
    assert loss_weighting("uniform", s) is None
    assert RectifiedFlow(weighting_scheme="cosmap").weight(s * 1000, s) is None
    assert RectifiedFlow(weighting_scheme="cosmap", weighted=True).weight(s * 1000, s) is not None


def test_mixing_and_target():
    flow = RectifiedFlow()
    data, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    times = torch.tensor([0.0, 1000.0])
    assert torch.equal(flow.mix(data, noise, times, None), torch.stack((data[0], noise[1])))
    assert torch.equal(flow.target(data, noise, times), noise - data)


def test_fixed_timesteps():
    assert fixed_timesteps(0, 1000, 4) == [200, 400, 600, 800]
    assert fixed_timesteps(200, 300, 4) == [220, 240, 260, 280]
