"""What every option of a prompt does to the image of a family."""

import inspect

import diffusers
import pytest
import torch

from library.base.text import PROMPT_OPTIONS, parse_prompt_line
from library.sampling.prompts import make_request
from library.sampling.samplers import SCHEDULERS, ZERO_TERMINAL
from library.strategy_flux import FluxDenoisingStrategy, sampling_sigmas

BASE = "a cat --w 64 --h 64 --s 3 --d 1"
# family -> option -> what is given beside it in both lines, and the option
ROWS = {
    "sd": {
        "w": ("", "--w 128"),
        "h": ("", "--h 128"),
        "d": ("", "--d 2"),
        "s": ("", "--s 4"),
        "l": ("", "--l 2"),
        "n": ("", "--n a dog"),
        "ss": ("", "--ss euler_a"),
    },
    "flux": {
        "w": ("", "--w 128"),
        "h": ("", "--h 128"),
        "d": ("", "--d 2"),
        "s": ("", "--s 4"),
        "l": ("", "--l 2"),
        "g": ("", "--g 1"),
        "n": ("--l 3", "--n a dog"),
        "fs": ("", "--fs 1"),
    },
}
UNREAD = {family: sorted(set(PROMPT_OPTIONS) - set(rows)) for family, rows in ROWS.items()}
GIVEN = {"g": "--g 1", "ss": "--ss euler_a", "cn": "--cn x.png", "ctr": "--ctr .5", "rcfg": "--rcfg 2", "fs": "--fs 2"}


def image(model, line):
    maker, defaults = model
    return maker.make(make_request(0, parse_prompt_line(line), defaults))


@pytest.mark.parametrize(("family", "letters"), [(family, one) for family, rows in ROWS.items() for one in rows])
def test_an_option_that_is_read_changes_the_image(family, letters, image_model):
    model = image_model(family)
    beside, given = ROWS[family][letters]
    first, second = (image(model, f"{BASE} {beside} {more}") for more in ("", given))
    assert first.shape != second.shape or not torch.equal(first, second)
    assert model[1].why_unread(PROMPT_OPTIONS[letters].key) is None


@pytest.mark.parametrize(("family", "letters"), [(family, one) for family, left in UNREAD.items() for one in left])
def test_an_option_that_is_not_read_changes_nothing(family, letters, image_model):
    model = image_model(family)
    assert model[1].why_unread(PROMPT_OPTIONS[letters].key)
    plain = make_request(0, parse_prompt_line(BASE), model[1])
    asked = make_request(0, parse_prompt_line(f"{BASE} {GIVEN[letters]}"), model[1])
    assert asked == (plain if letters != "cn" else asked)


def test_a_model_that_is_not_distilled_reads_no_guidance():
    given = {"guidance": 3.5, "prediction_type": "raw", "apply_t5_attn_mask": False}
    dev, schnell = (FluxDenoisingStrategy(None, variant=name, **given).sample_defaults for name in ("dev", "schnell"))
    assert dev.why_unread("guidance_scale") is None and schnell.why_unread("guidance_scale")
    assert (dev.guidance, schnell.guidance) == (3.5, None)


def test_noise_levels_of_flux():
    """Recorded levels of the shift by size; a given shift of 1 leaves them straight."""
    assert sampling_sigmas(4, 1024).tolist() == pytest.approx([1, 0.84923, 0.65249, 0.38494, 0], abs=1e-5)
    assert sampling_sigmas(4, 4096).tolist() == pytest.approx([1, 0.90453, 0.75951, 0.51284, 0], abs=1e-5)
    assert sampling_sigmas(4, 4096, 1.0).tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert sampling_sigmas(2, 4096, 3.0).tolist() == [1, 0.75, 0]


def test_samplers_for_zero_terminal_schedules_are_those_of_diffusers():
    able = {
        name
        for name, (kind, _) in SCHEDULERS.items()
        if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, kind).__init__).parameters
    }
    assert set(ZERO_TERMINAL) == able


def test_a_zero_terminal_run_offers_the_samplers_that_can(image_model):
    _, defaults = image_model("sd", "--zero_terminal_snr", "--v_parameterization")
    assert defaults.samplers == ZERO_TERMINAL
    assert "--zero_terminal_snr" in defaults.sampler_problem("lms")
    assert defaults.sampler_problem("euler") is None
