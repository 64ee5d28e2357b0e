"""Latent caching of 160 photographs of about 1250 pixels, beside the VAE's own time. Target: 0.04 s per image more.

python benchmarks/latent_caching.py
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import ROOT, write_inputs
from PIL import Image

sys.path.insert(0, str(ROOT))
TARGET = 0.04
COUNT = 160
SIDE = 1250


def photographs(source: Path, folder: Path) -> None:
    """JPEG files of about SIDE pixels made from the sample photographs, each a little different."""
    folder.mkdir()
    originals = sorted(path for path in source.iterdir() if path.suffix in (".png", ".jpg", ".webp"))
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        with Image.open(originals[number % len(originals)]) as image:
            width, height = image.size
            scale = SIDE / max(width, height)
            large = image.convert("RGB").resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        noisy = np.asarray(large, np.int16) + rng.integers(-6, 7, (large.height, large.width, 1), dtype=np.int16)
        name = folder / f"{number:03d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(name, quality=92)
        name.with_suffix(".txt").write_text("a photograph", encoding="utf-8")


class TimedEncoder:
    """Counts the time spent inside the VAE."""

    def __init__(self, encoder) -> None:
        self.encoder = encoder
        self.seconds = 0.0

    def encode(self, images, items):
        started = time.perf_counter()
        latents = self.encoder.encode(images, items)
        self.seconds += time.perf_counter() - started
        return latents


class NoEncoder:
    """Takes no time: shows what reading and writing alone can do."""

    def encode(self, images, items):
        return torch.zeros(len(items), 16, images.shape[2] // 8, images.shape[3] // 8)


def timed(work) -> float:
    """Seconds per image."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) / COUNT


def main() -> None:
    from library.base.safetensors_io import TensorFile
    from library.caching.latent_files import LatentLayout
    from library.caching.latents import LatentFiles, all_items
    from library.config_util import resolve_datasets
    from library.data.build import scan
    from library.data.dataset import ReadSettings, TrainDataset
    from library.data.records import ScanRules
    from library.modules.vae import load_vae
    from library.strategy_flux import FluxLatentsCachingStrategy
    from library.training.latents import LatentEncoder

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = write_inputs(Path(place))
        photographs(folder / "data" / "img", folder / "photos")
        subset = {"image_dir": str(folder / "photos"), "caption_extension": ".txt"}
        dataset = {"resolution": 512, "enable_bucket": True, "max_bucket_reso": 1024, "subsets": [subset]}
        plans = resolve_datasets({"datasets": [dataset]}, {})
        images = scan(plans, source="benchmark", seed=0, step=16, rules=ScanRules())
        data = TrainDataset(images.train, ReadSettings(seed=0, max_steps=0, with_images=True))
        vae = load_vae(TensorFile(folder / "models" / "ae_tiny.safetensors"), "", dtype=torch.float32, device="cpu")
        encoder = TimedEncoder(LatentEncoder(FluxLatentsCachingStrategy(), vae, channels=16, factor=8))

        def surveyed(suffix: str) -> LatentFiles:
            files = LatentFiles(data, LatentLayout(suffix=suffix, channels=16), 8, ("benchmark",))
            files.survey()
            return files

        bare, files = surveyed("_none"), surveyed("_flux")
        without = timed(lambda: bare.fill(NoEncoder(), batch_size=1))
        taken = timed(lambda: files.fill(encoder, batch_size=1))
        looked = timed(lambda: surveyed("_flux"))
        reader, items = surveyed("_flux").reader(), list(all_items(data))
        read = timed(lambda: [reader.read(item, flipped=False) for item in items])
        decoding = timed(lambda: [data.view(item, False) for item in items])
    floor = encoder.seconds / COUNT
    rows = {
        "decode and resize alone, one core": decoding,
        "caching without a VAE": without,
        "VAE alone (floor)": floor,
        "caching to disk, everything together": taken,
        "beyond the VAE": taken - floor,
        "looking at a complete cache": looked,
        "reading a cached latent": read,
    }
    for name, value in rows.items():
        print(f"{name:<38} {value * 1000:7.2f} ms per image")
    print(f"target: {TARGET * 1000:.0f} ms beyond the VAE: {'met' if taken - floor < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
