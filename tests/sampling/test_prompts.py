"""Prompt files."""

import json

import pytest

from library.base.errors import UserError
from library.sampling.prompts import SampleDefaults, read_prompts

DEFAULTS = SampleDefaults(steps=20, scale=1.0, guidance=3.5, size=512, multiple=16)


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return read_prompts(str(path), DEFAULTS)


def test_three_formats(tmp_path):
    text = "# no\n\na cat --w 100 --d 3 --s 5000\na dog --d -1\n"
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


def test_mistakes(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path / "p.txt", "a --x 1\nb\nc --w wide\n")
    assert "p.txt line 1" in str(error.value) and "p.txt line 3" in str(error.value)
    with pytest.raises(UserError, match="did you mean width"):
        read(tmp_path / "p.json", '[{"prompt": "a", "widht": 3}]')
    with pytest.raises(UserError, match="expected a .txt, .toml or .json file"):
        read(tmp_path / "p.md", "a")
    with pytest.raises(UserError, match="holds no prompt"):
        read(tmp_path / "p.txt", "# nothing\n")
    with pytest.raises(UserError, match="no such file"):
        read_prompts(str(tmp_path / "none.txt"), DEFAULTS)
