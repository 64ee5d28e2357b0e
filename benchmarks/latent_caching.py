"""Latent caching of 160 photographs of about 1250 pixels, beside the VAE's own time. Target: under 0.04 s per image more.

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


def main() -> None:
    from library.caching.latent_files import LatentLayout
    from library.caching.latents import LatentFiles
    from library.config_util import resolve_datasets
    from library.data.build import scan
    from library.data.dataset import ReadSettings, TrainDataset
    from library.data.records import ScanRules
    from library.modules.vae import load_vae
    from library.base.safetensors_io import TensorFile
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
        files = LatentFiles(data, LatentLayout(suffix="_flux", channels=16), 8, ("benchmark",))
        files.survey()
        started = time.perf_counter()
        files.fill(encoder, batch_size=1)
        taken = time.perf_counter() - started
        started = time.perf_counter()
        again = LatentFiles(data, LatentLayout(suffix="_flux", channels=16), 8, ("benchmark",))
        again.survey()
        looked = time.perf_counter() - started
        assert not again.pending()
        item = next(iter(files.requests))
        from library.caching.latents import all_items

        reader = again.reader()
        items = list(all_items(data))
        started = time.perf_counter()
        for item in items:
            reader.read(item, flipped=False)
        read = (time.perf_counter() - started) / COUNT
        started = time.perf_counter()
        for item in items:
            data.view(item, False)
        decoding = (time.perf_counter() - started) / COUNT
    beyond = (taken - encoder.seconds) / COUNT
    print(f"decode and resize alone, one core:    {decoding * 1000:6.1f} ms per image")
    print(f"VAE alone (floor):                    {encoder.seconds / COUNT * 1000:6.1f} ms per image")
    print(f"caching to disk, everything together: {taken / COUNT * 1000:6.1f} ms per image")
    state = "met" if beyond < TARGET else "MISSED"
    print(
        f"beyond the VAE:                       {beyond * 1000:6.1f} ms per image; target {TARGET * 1000:.0f} ms: {state}"
    )
    print(f"looking at {COUNT} complete caches: {looked * 1000:.0f} ms; reading one: {read * 1000:.2f} ms")


if __name__ == "__main__":
    main()
