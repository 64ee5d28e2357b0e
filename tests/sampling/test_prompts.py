"""Prompt files: grammar, mistakes, what has no effect."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from library.base.errors import UserError
from library.base.text import PROMPT_OPTIONS, parse_prompt_line
from library.sampling.prompts import SampleDefaults, SampleRequest, read_prompts

DEFAULTS = SampleDefaults(steps=20, scale=1.0, guidance=3.5, size=512, multiple=16, reads=frozenset({"guidance_scale"}))
ALL = replace(
    DEFAULTS,
    multiple=1,
    samplers=("ddim", "euler_a"),
    sampler="ddim",
    reads=frozenset({"guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift", "controlnet_image"}),
)
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "training.json").read_text(encoding="utf-8"))["prompts"]


def read(path, text, defaults=DEFAULTS):
    path.write_text(text, encoding="utf-8")
    return read_prompts(str(path), defaults)


# line of the recorded grammar -> keys that differ here, and why
DIFFERENT = {
    # an option begins with two dashes: text that looks like one changes nothing
    "w 123 is a prompt --s 5000": {"width": None},
    "s 30 starts like an option": {"sample_steps": None},
    # a number is a number
    "x --W 100 --ss euler_a --cn /a/b.png --ctr 0.3 --rcfg 1.2 --fs 5.0": {"flow_shift": 5.0},
}
ATTRIBUTES = {
    "sample_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "sample_sampler": "sampler",
}


@pytest.mark.parametrize("line", GOLDEN)
def test_recorded_grammar(line, tmp_path, monkeypatch):
    """Every recorded row, except where the reference takes text for an option or drops what it does not know."""
    if "--am" in line:
        with pytest.raises(UserError, match="unknown option --am"):
            read(tmp_path / "p.txt", line, ALL)
        return
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # the image of --cn
    (request,) = read(tmp_path / "p.txt", line, ALL)
    (default,) = read(tmp_path / "d.txt", "--n", ALL)
    expected = {**GOLDEN[line], **DIFFERENT.get(line, {})}
    for key in {"prompt", *(option.key for option in PROMPT_OPTIONS.values())}:
        name = ATTRIBUTES.get(key, key)
        value = expected.get(key)
        assert getattr(request, name) == (getattr(default, name) if value is None else value), key


def test_three_formats(tmp_path):
    text = "# no\n  # neither\n\na cat --w 100 --d 3 --s 5000\na dog --d -1\n"
    toml = """
[prompt]
width = 100
[[prompt.subset]]
prompt = 'a cat'
seed = 3
sample_steps = 5000
[[prompt.subset]]
prompt = 'a dog'
width = 512
"""
    items = ["a cat --w 100 --d 3 --s 5000", {"prompt": "a dog"}]
    for name, content in (("p.txt", text), ("p.toml", toml), ("p.json", json.dumps(items))):
        cat, dog = read(tmp_path / name, content)
        assert (cat.prompt, cat.width, cat.height, cat.seed, cat.steps, cat.index) == ("a cat", 96, 512, 3, 1000, 0)
        assert (dog.prompt, dog.seed, dog.scale, dog.guidance, dog.negative) == ("a dog", None, 1.0, 3.5, "")
        assert dog.width == 512  # in TOML over the 100 that all prompts share


# key -> (value, attribute of the request)
VALUES = {
    "width": 96,
    "height": 80,
    "seed": 5,
    "sample_steps": 3,
    "scale": 2.5,
    "guidance_scale": 1.5,
    "negative_prompt": "dull",
    "sample_sampler": "euler_a",
    "controlnet_image": __file__,
    "cfg_trunc_ratio": 0.5,
    "renorm_cfg": 1.25,
    "flow_shift": 4.0,
}


@pytest.mark.parametrize(("letters", "option"), PROMPT_OPTIONS.items())
def test_every_option_in_every_format(letters, option, tmp_path):
    """A family that reads an option gets it; one that does not gets its default."""
    value = VALUES[option.key]
    name = ATTRIBUTES.get(option.key, option.key)
    more = {} if letters == "l" else {"scale": 3.0}
    rest = "" if letters == "l" else " --l 3.0"
    shown = json.dumps(value)
    contents = {
        "p.txt": f"a --{letters} {value}{rest}",
        "p.toml": f"[prompt]\n[[prompt.subset]]\nprompt = 'a'\n{option.key} = {shown}\n"
        + "".join(f"{key} = {one}\n" for key, one in more.items()),
        "p.json": json.dumps([{"prompt": "a", option.key: value, **more}]),
    }
    for file, content in contents.items():
        (request,) = read(tmp_path / file, content, ALL)
        assert getattr(request, name) == value, file
        (unread,) = read(tmp_path / file, content, replace(ALL, reads=frozenset(), samplers=()))
        read_everywhere = letters in ("w", "h", "d", "s", "l", "n")
        assert (getattr(unread, name) == value) == read_everywhere, file


def test_what_a_request_holds_is_what_prompts_can_say():
    said = {ATTRIBUTES.get(option.key, option.key) for option in PROMPT_OPTIONS.values()}
    assert {item.name for item in fields(SampleRequest)} == said | {"index", "prompt"}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("a --x 1", "unknown option --x"),
        ("a --width 3", "did you mean --w?"),
        ("a --w512", "did you mean --w 512?"),
        ("a --w=512", "did you mean --w 512?"),
        ("a --sampler ddim", "did you mean --ss?"),
        ("a --w wide", "--w wide: expected a whole number of at least 1"),
        ("a --w 0", "--w 0: expected a whole number"),
        ("a --h -8", "--h -8: expected a whole number"),
        ("a --s 0", "--s 0: expected"),
        ("a --s -3", "--s -3: expected"),
        ("a --s 2.5", "--s 2.5: expected"),
        ("a --d 1e3", "--d 1e3: expected"),
        (f"a --d {2**64}", "below 2^63"),
        ("a --l -1", "--l -1: expected"),
        ("a --l nan", "--l nan: expected a number"),
        ("a --g inf", "--g inf: expected a number"),
        ("a --ctr 1.5", "between 0 and 1"),
        ("a --fs 0", "above 0"),
        ("a --ss", "the name of a sampler"),
        ("a --ss euler_b", "did you mean 'euler_a'?"),
        ("a --cn nowhere.png", "no such file"),
        ("a --w", "--w: expected"),
    ],
)
def test_mistakes_name_file_and_line(line, text, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.txt", f"fine\n{line}\n", ALL)
    assert "p.txt line 2" in str(error.value) and text in str(error.value)
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.json", json.dumps(["fine", line]), ALL)
    assert "p.json: [1]" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"widht": 3}, "widht: unknown key; did you mean width?"),
        ({"w": 3}, "w: unknown key; did you mean width?"),
        ({"width": "512"}, "write 512 without quotes"),
        ({"width": 512.5}, "width: expected a whole number"),
        ({"width": True}, "width: expected a whole number"),
        ({"sample_steps": 0}, "sample_steps: expected"),
        ({"scale": "much"}, "scale: expected a number"),
        ({"prompt": 5}, "prompt: expected a text"),
        ({"negative_prompt": 5}, "negative_prompt: expected a text"),
        ({"sample_sampler": "no"}, "expected one of ddim, euler_a"),
    ],
)
def test_mistakes_in_tables(entry, text, tmp_path):
    for name, content in (
        ("p.json", json.dumps([entry])),
        ("p.toml", "[[prompt.subset]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in entry.items())),
    ):
        with pytest.raises(UserError) as error:
            read(tmp_path / name, content, ALL)
        assert text in str(error.value) and name in str(error.value)


def test_all_mistakes_are_reported_together(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.txt", "a --x 1\nb\nc --w wide\nd --ss none", ALL)
    assert [problem.where.partition(" line ")[2] for problem in error.value.problems] == ["1", "3", "4: --ss"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("p.md", "a", "expected a .txt, .toml or .json file"),
        ("p.txt", "# nothing\n", "holds no prompt"),
        ("p.json", "{}", "expected a list"),
        ("p.json", "[3]", "expected a text, or a table"),
        ("p.json", "[", "cannot be read"),
        ("p.toml", "[prompt]\nprompt = 'a'\n", "expected [[prompt.subset]] tables"),
        ("p.toml", "[prompts]\nwidth = 3\n", "prompts: unknown key"),
        ("p.toml", "prompt = 'a'", "expected [[prompt.subset]] tables"),
    ],
)
def test_files_that_are_no_prompt_files(name, content, text, tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / name, content)
    assert text in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"), DEFAULTS)


def test_one_warning_names_what_has_no_effect(tmp_path, messages):
    lines = "a --ss ddim --ctr 0.5\nb --ctr 0.2 --n dull\nc --l 2 --n dull --rcfg 1 --fs 3 --cn nowhere.png\n"
    read(tmp_path / "p.txt", lines)
    (warning,) = [text for text in messages.messages if "no effect" in text]
    for part in ("--ss (sample_sampler): ", "--ctr (cfg_trunc_ratio): ", "--rcfg", "--fs", "--cn", "--n (negative"):
        assert warning.count(part) == 1, part
    assert "p.txt" in warning
    messages.clear()
    read(tmp_path / "p.txt", "a --g 2 --l 3 --n dull\n")
    assert not messages.messages


def test_changed_numbers_are_said(tmp_path, messages):
    read(tmp_path / "p.txt", "a --w 100 --h 10\nb --s 5000\nc --w 96\n")
    (warning,) = messages.messages
    assert "100x10 becomes 96x64" in warning and "5000 steps become 1000" in warning


def test_dashes_inside_a_prompt_are_text():
    assert parse_prompt_line("well--known -- a 1920x1080 --5 thing") == {
        "prompt": "well--known -- a 1920x1080 --5 thing"
    }
    assert parse_prompt_line("a\t--w\t64 --n well--known --N last") == {
        "prompt": "a",
        "width": 64,
        "negative_prompt": "last",
    }
