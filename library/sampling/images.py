"""Write sample images."""

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from library.base.safetensors_io import atomic_path
from library.sampling.prompts import SampleRequest


def save_png(image: Tensor, path: Path, request: SampleRequest) -> None:
    """Write an image [3, h, w] in [-1, 1]; the request goes into the PNG's text."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", json.dumps(asdict(request), ensure_ascii=False))
    with atomic_path(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=info)


def sample_path(folder: Path, output_name: str | None, occasion: str, request: SampleRequest, seed: int) -> Path:
    """`<output_name>_<e000001 or 000100>_<index>_<time>_<seed>.png`."""
    stamp = datetime.now().strftime("%Y%m%d%H%M%S")
    start = f"{output_name}_" if output_name else ""
    return folder / f"{start}{occasion}_{request.index:02d}_{stamp}_{seed}.png"
