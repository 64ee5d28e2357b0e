"""Noise, targets, losses and their weights, against recorded numbers of the reference."""

import json
import random
from pathlib import Path

import pytest
import torch
from support.batches import step_inputs

from library.batch import ItemAddress
from library.diffusion.ddpm import Ddpm, SnrWeights, alphas_cumprod
from library.diffusion.flow import RectifiedFlow, discrete_sigmas, loss_weighting, shifted
from library.diffusion.losses import SampleLoss, element_losses, huber_thresholds
from library.diffusion.noise import (
    LevelDraw,
    NoiseRecipe,
    add_coarse,
    coarse_size,
    item_generators,
    offset_strength,
    strata,
)
from library.diffusion.process import fixed_timesteps

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "golden" / "training.json").read_text())
NOISE = GOLDEN["noise (torch.manual_seed(1234); random.seed(1234); lat=randn(2,4,8,8))"]
LOSS = GOLDEN["loss (t=0,100,500,999)"]
TIMES = torch.tensor([0.0, 100.0, 500.0, 999.0])
SNR = alphas_cumprod()[TIMES.long()] / (1 - alphas_cumprod()[TIMES.long()])


def test_schedule():
    for name, zero in (("alphas_cumprod", False), ("ztsnr", True)):
        recorded = GOLDEN[name]["alphas_cumprod"] if zero else GOLDEN[name]
        ours = alphas_cumprod(zero_terminal=zero)
        for index, value in recorded.items():
            assert float(ours[int(index)]) == pytest.approx(value, rel=2e-4, abs=1e-12), (name, index)


def test_signal_to_noise():
    for index, value in GOLDEN["all_snr"].items():
        signal = alphas_cumprod()[int(index)]
        assert float(signal / (1 - signal)) == pytest.approx(value, rel=1e-5)
        ratio = Ddpm().noise_to_signal(torch.tensor([float(index)]), None)
        assert float(ratio) ** -2 == pytest.approx(value, rel=1e-4)


# what the recorded cases drew, in the order in which they drew it
RECIPES = {
    "plain": {},
    "offset": {"offset": 0.1},
    "offset_rand": {"offset": 0.1, "random": True},
    "adaptive": {"offset": 0.1, "adaptive": 0.05},
    "pyramid": {"levels": 6, "discount": 0.3},
    "offset+pyramid": {"offset": 0.1, "levels": 6, "discount": 0.3},
    "ip": {"gamma": 0.1},
    "ip_rand": {"gamma": 0.1, "random": True},
    "ts_range": {"range": (200, 400)},
    "ts_fixed": {"range": (400, 400)},
}


@pytest.mark.parametrize("name", sorted(NOISE))
def test_noise(name):
    """The reference's draws put into our formulas give its noise, timesteps and noisy latents."""
    case, settings = NOISE[name], RECIPES[name]
    torch.manual_seed(1234)
    random.seed(1234)
    latents = torch.randn(2, 4, 8, 8)
    noise = torch.randn_like(latents)
    if offset := settings.get("offset"):
        strength = float(torch.rand(1)) * offset if settings.get("random") else offset
        noise = noise + offset_strength(strength, latents, settings.get("adaptive")) * torch.randn(2, 4, 1, 1)
    if levels := settings.get("levels"):
        for level in range(levels):
            size = coarse_size((8, 8), random.random() * 2 + 2, level)
            coarse = torch.randn(2, 4, *size)
            weight = settings["discount"] ** level
            noise = torch.stack([add_coarse(one, small, weight) for one, small in zip(noise, coarse)])
            if 1 in size:
                break
        noise = noise / noise.std()
    low, high = settings.get("range", (0, 1000))
    timesteps = torch.randint(low, high, (2,)) if low < high else torch.full((2,), high)
    disturbed = noise
    if gamma := settings.get("gamma"):
        strength = float(torch.rand(1)) * gamma if settings.get("random") else gamma
        disturbed = noise + strength * torch.randn_like(latents)
    assert timesteps.tolist() == case["timesteps"]
    noisy = Ddpm().mix(latents, disturbed, timesteps.float(), None)
    assert noise.flatten()[:4].tolist() == pytest.approx(case["noise_first4"], rel=1e-5)
    assert noisy.flatten()[:4].tolist() == pytest.approx(case["noisy_first4"], rel=1e-4, abs=1e-6)
    assert float(noise.sum()) == pytest.approx(case["noise_sum"], rel=1e-4)
    assert float(noisy.sum()) == pytest.approx(case["noisy_sum"], rel=1e-4)


@pytest.mark.parametrize("sampling", ["sigma", "uniform", "sigmoid", "shift", "flux_shift"])
def test_flow_levels(sampling):
    case = GOLDEN["flux timestep (seed 1234; lat randn(2,16,8,8); noise randn_like; shift 3)"][sampling]
    torch.manual_seed(1234)
    latents = torch.randn(2, 16, 8, 8)
    noise = torch.randn_like(latents)
    flow = RectifiedFlow(sampling=sampling, shift=3.0)

    class Global(LevelDraw):
        def uniform(self):
            return next(self.generator)

        normal = uniform

    values = iter((torch.rand(2) if sampling in ("sigma", "uniform") else torch.randn(2)).split(1))
    timesteps, sigmas = flow.sample([Global(values), Global(values)], (8, 8))
    assert timesteps.tolist() == pytest.approx(case["timesteps"], rel=1e-5)
    assert sigmas.tolist() == pytest.approx(case["sigmas"], rel=1e-5)
    assert float(flow.mix(latents, noise, timesteps, sigmas).sum()) == pytest.approx(case["noisy_sum"], rel=1e-4)


def test_logit_normal_density_with_integer_times():
    """The recorded draws are those of `shift`, cut to whole timesteps."""
    case = GOLDEN["sd3 logit_normal shift3"]
    torch.manual_seed(1234)
    torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)  # latents and noise come first
    levels = shifted(torch.sigmoid(torch.randn(2)), 3.0)
    assert (levels * 1000).floor().tolist() == case["timesteps"]
    assert ((levels * 1000).floor() / 1000).tolist() == pytest.approx(case["sigmas"])


def test_distances():
    target, prediction, c = torch.zeros(1, 2), torch.tensor([[0.5, -1.0]]), torch.tensor([0.1])
    for kind in ("l1", "l2", "huber", "smooth_l1"):
        recorded = LOSS[f"{kind} (pred .5,-1 target 0 c=.1)"]
        assert element_losses(kind, prediction, target, c)[0].tolist() == pytest.approx(recorded, rel=1e-5)


def test_huber_thresholds():
    ratio = Ddpm().noise_to_signal(TIMES, None)
    for schedule in ("constant", "exponential", "snr"):
        recorded = LOSS[f"huber_c_{schedule}(c=.1,scale=2,t=0,100,500,999)"]
        ours = huber_thresholds(schedule, 0.1, 2.0, TIMES, ratio)
        if schedule == "snr":
            ours = ours / 2  # the reference forgets the scale there
        assert ours.tolist() == pytest.approx(recorded, rel=1e-4)


def test_huber_thresholds_of_a_flow_fall_from_one_to_c():
    flow = RectifiedFlow()
    times = torch.tensor([0.0, 500.0, 1000.0])
    ours = huber_thresholds("snr", 0.1, 1.0, times, flow.noise_to_signal(times, None))
    assert ours.tolist() == pytest.approx([1.0, 0.9 * 0.25 + 0.1, 0.1])


@pytest.mark.parametrize(
    ("name", "weights", "velocity"),
    [
        ("min_snr 5 eps", SnrWeights(min_snr_gamma=5), False),
        ("min_snr 5 v", SnrWeights(min_snr_gamma=5), True),
        ("scale_v", SnrWeights(scale_velocity=True), True),
        ("v_pred_like .5", SnrWeights(velocity_like=0.5), False),
        ("debiased eps", SnrWeights(debiased=True), False),
        ("debiased v", SnrWeights(debiased=True), True),
    ],
)
def test_weights(name, weights, velocity):
    assert weights.factor(SNR, velocity=velocity).tolist() == pytest.approx(LOSS[name], rel=1e-4)
    process = Ddpm(velocity=velocity, weights=weights)
    assert process.weight(TIMES, None).tolist() == pytest.approx(LOSS[name], rel=1e-4)


def test_weights_multiply():
    both = SnrWeights(min_snr_gamma=5, debiased=True).factor(SNR, velocity=False)
    alone = SnrWeights(min_snr_gamma=5).factor(SNR, velocity=False) * SnrWeights(debiased=True).factor(
        SNR, velocity=False
    )
    assert torch.equal(both, alone)


def test_weights_of_a_zero_terminal_schedule_follow_it_and_stay_finite():
    """The reference takes them from the schedule before it was changed."""
    last = torch.tensor([998.0, 999.0])
    for weights in (SnrWeights(debiased=True), SnrWeights(velocity_like=0.1), SnrWeights(min_snr_gamma=5)):
        found = Ddpm(zero_terminal=True, weights=weights).weight(last, None)
        assert torch.isfinite(found).all() and found[0] == pytest.approx(float(found[1]))
    velocity = Ddpm(zero_terminal=True, velocity=True, weights=SnrWeights(min_snr_gamma=5)).weight(TIMES, None)
    signal = alphas_cumprod(zero_terminal=True)[500]
    assert float(velocity[2]) == pytest.approx(float(signal / (1 - signal) / (signal / (1 - signal) + 1)), rel=1e-4)


def test_velocity_target_turns_noise_and_data():
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    times = torch.tensor([0.0, 999.0])
    target = Ddpm(velocity=True, zero_terminal=True).target(latents, noise, times)
    assert torch.allclose(target[1], -latents[1], atol=1e-6)
    assert torch.allclose(target[0], noise[0], atol=0.2)


def test_weighting_comes_before_the_mask_and_sample_weights_after_the_mean():
    inputs = step_inputs(size=2, latent=(4, 8, 8), masks=True)
    loss = SampleLoss(process=Ddpm())
    error = (torch.zeros_like(inputs.target) - inputs.target).square() * inputs.weight.view(2, 1, 1, 1)
    kept = torch.nn.functional.interpolate(inputs.batch.masks[:, None], size=(8, 8), mode="area")
    expected = (error * kept).flatten(1).mean(1) * inputs.batch.loss_weights
    assert torch.allclose(loss(torch.zeros_like(inputs.target), inputs), expected)


def items(count):
    return [ItemAddress(0, 0, n, f"{n}.png", 0, 1) for n in range(count)]


@pytest.mark.parametrize(
    "recipe",
    [
        NoiseRecipe(),
        NoiseRecipe(offset=0.2, adaptive_scale=0.1),
        NoiseRecipe(offset=0.2, offset_random=True, coarse_levels=6),
        NoiseRecipe(perturbation=0.1, perturbation_random=True),
    ],
)
def test_noise_of_an_image_is_its_own(recipe):
    """What an image gets does not depend on its batch."""
    latents = torch.randn(3, 4, 16, 16)

    def drawn(chosen):
        generators = item_generators(1, "noise", [items(3)[n] for n in chosen])
        noise = recipe.draw(generators, latents[chosen])
        return noise, recipe.perturbed(generators, noise)

    together = drawn([0, 1, 2])
    for n in range(3):
        alone = drawn([n])
        assert torch.equal(alone[0][0], together[0][n]) and torch.equal(alone[1][0], together[1][n])


def test_offsets_move_channels_and_coarse_noise_keeps_its_deviation():
    latents = torch.zeros(64, 4, 16, 16)
    generators = lambda: item_generators(1, "noise", items(64))  # noqa: E731
    moved = NoiseRecipe(offset=1.0).draw(generators(), latents) - NoiseRecipe().draw(generators(), latents)
    assert torch.allclose(moved, moved[..., :1, :1].expand_as(moved), atol=1e-5)
    assert float(moved[..., 0, 0].std()) == pytest.approx(1.0, abs=0.15)
    random_strength = NoiseRecipe(offset=1.0, offset_random=True).draw(generators(), latents)
    assert float(random_strength.mean((-1, -2)).abs().mean()) < float(moved[..., 0, 0].abs().mean())
    coarse = NoiseRecipe(coarse_levels=6, coarse_discount=0.9).draw(generators(), latents)
    assert coarse.flatten(1).std(1).tolist() == pytest.approx([1.0] * 64, abs=1e-4)
    smooth = (coarse[..., 1:] - coarse[..., :-1]).std() / coarse.std()
    assert float(smooth) < 1.2  # white noise has sqrt(2)


def test_strata_cover_the_distribution_evenly():
    chosen = [k for first in range(0, 20, 4) for k, _ in strata(7, 1, first, 4, 10)]
    assert sorted(chosen[:10]) == list(range(10)) and sorted(chosen[10:]) == list(range(10))
    assert chosen[:10] != chosen[10:]
    generators = [torch.Generator().manual_seed(n) for n in range(1000)]
    draws = [LevelDraw(g, (n, 1000)) for n, g in enumerate(generators)]
    uniform = RectifiedFlow(sampling="uniform").sample(draws, (8, 8))[1]
    assert torch.allclose(uniform, torch.arange(1000) / 1000 + 5e-4, atol=6e-4)
    normal = torch.logit(RectifiedFlow(sampling="sigmoid").sample(draws, (8, 8))[1])
    assert float(normal.mean()) == pytest.approx(0, abs=0.01) and float(normal.std()) == pytest.approx(1, abs=0.01)
    times = Ddpm(min_timestep=100, max_timestep=600).sample(draws, (8, 8))[0]
    assert times.tolist() == sorted(times.tolist()) and {100.0, 599.0} <= set(times.tolist())


def test_shift_and_weighting_formulas():
    assert float(discrete_sigmas(3.0)[0]) == 1.0 and float(shifted(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)
    sigmas = torch.tensor([0.5])
    assert float(loss_weighting("sigma_sqrt", sigmas)) == pytest.approx(4.0)
    assert float(loss_weighting("cosmap", sigmas)) == pytest.approx(2 / (torch.pi * 0.5))


def test_validation_levels():
    for name, recorded in GOLDEN.items():
        if name.startswith("validation_timesteps"):
            low, high = map(int, name.split()[-1].split("-"))
            assert fixed_timesteps(low, high, 4) == recorded
