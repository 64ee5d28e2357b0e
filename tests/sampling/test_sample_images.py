"""Image files: names, settings in their text, sheets; and the runner that makes them."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from PIL import Image

from library.sampling import runner as runner_module
from library.sampling.images import find_image, save_png, settings_text, write_sheet
from library.sampling.progress import SampleProgress
from library.sampling.prompts import SampleRequest
from library.sampling.runner import SampleRunner, SampleTarget

REQUEST = SampleRequest(
    index=3,
    prompt="a cat, sitting",
    negative="dull, grey",
    width=64,
    height=96,
    steps=4,
    scale=3.5,
    guidance=None,
    seed=12,
    sampler="euler_a",
)


def read_settings(text):
    """As image programs do: the last line holds names and values, the lines before it the prompts."""
    *prompts, last = text.split("\n")
    values = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    negative = [n for n, line in enumerate(prompts) if line.startswith("Negative prompt:")]
    where = negative[0] if negative else len(prompts)
    return "\n".join(prompts[:where]), "\n".join(prompts[where:]).removeprefix("Negative prompt: "), values


def test_settings_can_be_read_by_image_programs():
    assert read_settings(settings_text(REQUEST, "base, v1")) == (
        "a cat, sitting",
        "dull, grey",
        {
            "Steps": "4",
            "Sampler": "Euler a",
            "CFG scale": "3.5",
            "Seed": "12",
            "Size": "64x96",
            "Model": '"base, v1"',
        },
    )
    unguided = replace(REQUEST, scale=1.0, guidance=2.5, flow_shift=3.0, sampler="euler")
    prompt, negative, values = read_settings(settings_text(unguided, "base"))
    assert (prompt, negative) == ("a cat, sitting", "")  # a negative prompt that did nothing is not shown
    assert (values["Distilled CFG Scale"], values["Shift"], values["Sampler"]) == ("2.5", "3", "Euler")


@pytest.mark.parametrize("prompt", ["a cat", "eine Tür, ein Ä", "a 猫"])
def test_images_hold_their_settings(prompt, tmp_path):
    request = replace(REQUEST, prompt=prompt)
    save_png(torch.zeros(3, 96, 64), tmp_path / "a.png", request, "base")
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"] == settings_text(request, "base")
        assert json.loads(image.text["sample_request"]) == {**asdict(request), "model": "base"}
        assert image.getpixel((0, 0)) == (128, 128, 128) and image.size == (64, 96)


def test_sheets_show_every_image(tmp_path):
    made = []
    for number, shade in enumerate((-1.0, 1.0)):
        request = replace(REQUEST, index=number)
        save_png(torch.full((3, 64, 64), shade), tmp_path / f"{number}.png", request, "base")
        made.append((tmp_path / f"{number}.png", request))
    sheet = write_sheet(made, tmp_path, "last", "e000001")
    assert sheet.name == "last_e000001_sheet.png"
    with Image.open(sheet) as image:
        colours = {colour for _, colour in image.getcolors(100_000)}
        assert {(0, 0, 0), (255, 255, 255)} <= colours and image.width > 2 * 300
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    assert write_sheet(made, tmp_path, None, "000001").name == "000001_sheet.png"


def test_images_of_other_processes_are_found_by_name(tmp_path):
    for name in ("last_000001_03_20250101000000_12.png", "last_000001_03_20250101000005_12.png", "last_000001_x.png"):
        (tmp_path / name).write_text("")
    found = find_image(tmp_path, "last", "000001", REQUEST, "20250101000001")
    assert found is not None and found.name == "last_000001_03_20250101000005_12.png"
    assert find_image(tmp_path, "last", "000001", REQUEST, "20250101000009") is None  # of an earlier run
    assert find_image(tmp_path, "last", "000001", replace(REQUEST, seed=2), "2") is None
    assert find_image(tmp_path, None, "000001", REQUEST, "2") is None


@pytest.fixture
def requests():
    small = replace(REQUEST, width=64, height=64, steps=1, scale=1.0, negative="", sampler="ddim")
    return [replace(small, index=n, prompt=text, seed=None) for n, text in enumerate(("a cat", "a dog", "a cup"))]


def target(folder, **more):
    return SampleTarget(folder=folder, output_name="last", model="base", seed=42, **more)


def test_processes_share_the_prompts(image_model, requests, tmp_path, messages):
    """The first process tells of all images and draws the sheet; one process alone makes the same images."""
    model, _ = image_model("sd")
    told = []

    def tell(path, request, occasion):
        told.append((path.name, request.index, request.seed, occasion))

    shared = tmp_path / "two"
    second = SampleRunner(model, requests, target(shared, rank=1, world_size=2))
    first = SampleRunner(
        model, requests, target(shared, rank=0, world_size=2, wait_for_all=lambda: second.run("000001")), tell
    )
    second.target = replace(second.target, wait_for_all=lambda: None)
    first.run("000001")
    assert sorted(index for _, index, _, _ in told) == [0, 1, 2]
    assert (len(first.written), len(second.written)) == (2, 1)
    assert (shared / "last_000001_sheet.png").exists()
    assert sum("samples 000001: 3 images in" in text for text in messages.messages) == 1
    SampleRunner(model, requests, target(tmp_path / "one")).run("000001")

    def pixels(folder):
        return [Image.open(path).tobytes() for path in sorted(folder.iterdir()) if "sheet" not in path.name]

    assert pixels(shared) == pixels(tmp_path / "one")
    for name, _, seed, occasion in told:
        assert name.endswith(f"_{seed}.png") and occasion == "000001"


def test_one_prompt_needs_no_sheet(image_model, requests, tmp_path):
    model, _ = image_model("sd")
    SampleRunner(model, requests[:1], target(tmp_path)).run("000001")
    assert not list(tmp_path.glob("*sheet*"))


def test_seeds(image_model, requests, tmp_path):
    """A given seed gives the same image every time, another run's seed changes only prompts without one."""
    model, _ = image_model("sd")
    asked = [replace(requests[0], seed=7), requests[1]]
    a, b = (
        [model.make(request).tolist() for request in SampleRunner(model, asked, target(tmp_path, **more)).requests]
        for more in ({}, {})
    )
    assert a == b
    other = SampleRunner(model, asked, replace(target(tmp_path), seed=43)).requests
    assert other[0].seed == 7 and model.make(other[0]).tolist() == a[0]
    assert model.make(other[1]).tolist() != a[1]


def test_drawing_elsewhere_is_not_touched(image_model, requests):
    model, _ = image_model("sd")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model.make(replace(requests[0], seed=3, sampler="euler_a", steps=2))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("family", "sampler"), [("sd", "heun"), ("sd", "pndm"), ("flux", None)])
def test_progress_counts_every_step(family, sampler, image_model, requests, monkeypatch):
    """Samplers with several calls of the model per step come to the same total."""
    model, _ = image_model(family)
    shares = []
    model.make(replace(requests[0], seed=1, steps=4, sampler=sampler), shares.append)
    assert len(shares) >= 4 and sum(shares) == pytest.approx(1)


def test_progress_line(requests):
    class Terminal:
        def __init__(self, yes):
            self.yes, self.text = yes, ""

        def isatty(self):
            return self.yes

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    for yes in (True, False):
        stream = Terminal(yes)
        with SampleProgress([replace(r, steps=2) for r in requests], "samples", stream=stream) as progress:
            for request in progress.requests:
                progress.begin(request)
                progress.tick(0.5)
                progress._bar.refresh() if yes else None
                progress.tick(0.5)
        # a file or a pipe gets a line every few seconds only
        assert ("image 2 of 3, step 1 of 2" in stream.text) == yes and bool(stream.text) == yes


def test_only_the_first_process_shows_progress(image_model, requests, tmp_path, monkeypatch):
    model, _ = image_model("sd")
    shown = []
    real = SampleProgress.__init__
    monkeypatch.setattr(
        runner_module.SampleProgress,
        "__init__",
        lambda self, *given, show, **more: shown.append(show) or real(self, *given, show=False, **more),
    )
    for rank in (0, 1):
        SampleRunner(model, requests[:1], target(tmp_path, rank=rank)).run("000001")
    assert shown == [True, False]
