"""Addresses, prompts, lazy imports, messages."""

import random

import numpy as np
import pytest
import torch

from library.base.errors import Problem, UserError, nearest, raise_problems
from library.base.lazy import optional_import, resolve
from library.base.randomness import address, python_random, seeded_globals
from library.base.text import parse_prompt_line


def test_addresses_are_stable_and_distinct():
    # this number must never change: it decides what every seed draws
    assert address(42, "noise", 1, "a.png") == address(42, "noise", 1, "a.png") == 3544593838028608436
    others = {address(42, "noise", 1, "b.png"), address(42, "time", 1, "a.png"), address(43, "noise", 1, "a.png")}
    assert len(others | {address(42, "noise", 1, "a.png")}) == 4
    # parts do not run into each other
    assert address(1, "x", "a", "b") != address(1, "x", "ab")
    assert python_random(1, "x").random() == python_random(1, "x").random()


def test_names_that_are_no_text_have_addresses():
    assert address(1, "x", "\udcff.png") != address(1, "x", "\udcfe.png")


def test_seeding_globals_leaves_them_as_found():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    draws = []
    for _ in range(2):
        with seeded_globals(5):
            draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))
    assert draws[0] == draws[1]
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", {"prompt": "a cat"}),
        ("a cat --w 512 --h 64 --d 7", {"prompt": "a cat", "width": 512, "height": 64, "seed": 7}),
        ("w 123 is text --s 9", {"prompt": "w 123 is text", "sample_steps": 9}),
        (
            "a --n dull, grey --l 3.5 --g 2",
            {"prompt": "a", "negative_prompt": "dull, grey", "scale": 3.5, "guidance_scale": 2.0},
        ),
        ("a --ss euler_a --fs 3", {"prompt": "a", "sample_sampler": "euler_a", "flow_shift": 3.0}),
        ("well--known --D -1", {"prompt": "well--known", "seed": -1}),
    ],
)
def test_prompt_lines(line, expected):
    assert parse_prompt_line(line) == expected


@pytest.mark.parametrize(
    ("line", "text"), [("a --x 3", "unknown option --x"), ("a --w wide", "--w wide: expected a whole number")]
)
def test_prompt_lines_that_are_wrong(line, text):
    with pytest.raises(ValueError, match=text):
        parse_prompt_line(line)


def test_problems_are_raised_together():
    raise_problems([])
    with pytest.raises(UserError) as error:
        raise_problems([Problem("--a", "bad", 1), Problem("--b", "worse")])
    assert str(error.value) == "--a = 1: bad\n--b: worse"


def test_nearest():
    assert nearest("resolutoin", ["resolution", "batch_size"]) == "resolution"
    assert nearest("zzz", ["resolution"]) is None


def test_lazy():
    assert resolve("library.base.errors:UserError") is UserError
    with pytest.raises(UserError, match="pip install nothing"):
        optional_import("no_such_package", needed_for="--x", install="nothing")
