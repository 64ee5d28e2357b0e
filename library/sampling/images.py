"""Write sample images, each with the settings it was made with, and sheets of them."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from library.base.safetensors_io import atomic_path
from library.data.sheets import contact_sheet, write_picture
from library.sampling.prompts import SampleRequest

REQUEST_KEY = "sample_request"  # of the PNG text that holds the request as JSON
_CELL, _COLUMNS = 320, 6  # of a sheet: pixels, tiles per row

# names of our samplers in programs that read settings from images
_METHODS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "lms": "LMS",
    "k_lms": "LMS",
    "euler": "Euler",
    "k_euler": "Euler",
    "euler_a": "Euler a",
    "k_euler_a": "Euler a",
    "heun": "Heun",
    "dpm_2": "DPM2",
    "k_dpm_2": "DPM2",
    "dpm_2_a": "DPM2 a",
    "k_dpm_2_a": "DPM2 a",
    "dpmsolver": "DPM-Solver 2M",
    "dpmsolver++": "DPM++ 2M",
    "dpmsingle": "DPM++ 2S",
}


def settings_text(request: SampleRequest, model: str) -> str:
    """The settings as image programs write them: prompt, negative prompt, then names and values in one line.

    Args:
        request: with its seed.
        model: name of the base model.
    """
    values: dict[str, object] = {
        "Steps": request.steps,
        "Sampler": _METHODS.get(request.sampler or "", request.sampler),
    }
    values["CFG scale"] = f"{request.scale:g}"
    if request.guidance is not None:
        values["Distilled CFG Scale"] = f"{request.guidance:g}"
    if request.flow_shift is not None:
        values["Shift"] = f"{request.flow_shift:g}"
    values |= {"Seed": request.seed, "Size": f"{request.width}x{request.height}", "Model": _quoted(model)}
    lines = [request.prompt]
    if request.negative and request.scale != 1.0:
        lines.append(f"Negative prompt: {request.negative}")
    shown = ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    return "\n".join([*lines, shown])


def _quoted(value: str) -> str:
    """A value with characters that would end it stands in quotes."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def save_png(image: Tensor, path: Path, request: SampleRequest, model: str, *, with_text: bool = True) -> None:
    """Write an image, complete or not at all.

    Its text holds `parameters`, which image programs read, and `sample_request`, the request as JSON.

    Args:
        image: [3, h, w] in [-1, 1].
        path: where it goes.
        request: it was made from, with its seed.
        model: name of the base model.
        with_text: write that text.
    """
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    info = PngImagePlugin.PngInfo()
    if with_text:
        info.add_text("parameters", settings_text(request, model))
        info.add_text(REQUEST_KEY, json.dumps({**asdict(request), "model": model}, ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def time_stamp() -> str:
    """The time of now as it stands in file names."""
    return datetime.now().strftime("%Y%m%d%H%M%S")


def _beginning(output_name: str | None, occasion: str) -> str:
    return f"{output_name}_{occasion}" if output_name else occasion


def sample_path(folder: Path, output_name: str | None, occasion: str, request: SampleRequest) -> Path:
    """`<output_name>_<e000001 or 000100>_<index>_<time>_<seed>.png`."""
    name = f"{_beginning(output_name, occasion)}_{request.index:02d}_{time_stamp()}_{request.seed}.png"
    return folder / name


def find_image(folder: Path, output_name: str | None, occasion: str, request: SampleRequest, since: str) -> Path | None:
    """The image of a request that a process wrote at `since` or later (as in file names); None if it cannot be seen."""
    before, after = f"{_beginning(output_name, occasion)}_{request.index:02d}_", f"_{request.seed}.png"
    found = [
        path
        for path in folder.iterdir()
        if path.name.startswith(before)
        and path.name.endswith(after)
        and since <= path.name.removeprefix(before).removesuffix(after)
    ]
    return max(found, default=None)


def write_sheet(
    made: Sequence[tuple[Path, SampleRequest]], folder: Path, output_name: str | None, occasion: str
) -> Path:
    """A picture with a labelled tile for each image of an occasion; `<output_name>_<occasion>_sheet.png`.

    Args:
        made: images that are there, with their requests.
        folder: where it goes.
        output_name: start of its name.
        occasion: when the images were made.

    Raises:
        UserError: it cannot be written.
    """
    tiles = []
    for path, request in made:
        with Image.open(path) as opened:
            pixels = np.asarray(opened.convert("RGB"))
        tiles.append((pixels, f"{request.index:02d}: {request.prompt or '(no prompt)'}"))
    columns = min(_COLUMNS, math.ceil(math.sqrt(len(tiles))))
    path = folder / f"{_beginning(output_name, occasion)}_sheet.png"
    write_picture(contact_sheet(tiles, columns=columns, cell=_CELL), path)
    return path
