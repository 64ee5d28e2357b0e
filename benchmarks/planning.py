"""Planning 10,000 images: scan, buckets, repeats, order of an epoch. Target: under 5 s.

python benchmarks/planning.py
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))
TARGET = 5.0
COUNT = 10_000


def main() -> None:
    from library.config_util import resolve_datasets
    from library.data.build import scan
    from library.data.dataset import ReadSettings, TrainDataset
    from library.data.loader import TrainData
    from library.data.records import ScanRules

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        encoded = []
        for _ in range(200):
            width, height = rng.integers(200, 900, 2)
            Image.new("RGB", (int(width), int(height))).save(folder / "x.jpg")
            encoded.append((folder / "x.jpg").read_bytes())
        (folder / "x.jpg").unlink()
        for number in range(COUNT):
            (folder / f"{number:05d}.jpg").write_bytes(encoded[number % len(encoded)])
            (folder / f"{number:05d}.txt").write_text("one tag, another tag", encoding="utf-8")
        subset = {"image_dir": str(folder), "caption_extension": ".txt", "num_repeats": 2, "cache_info": True}
        dataset = {"resolution": 1024, "enable_bucket": True, "max_bucket_reso": 2048, "batch_size": 4}
        config = {"datasets": [{**dataset, "subsets": [subset]}]}
        for name in ("first scan", "with cache_info"):
            started = time.perf_counter()
            images = scan(resolve_datasets(config, {}), source="benchmark", seed=0, step=64, rules=ScanRules())
            scanned = time.perf_counter() - started
            data = TrainData(
                TrainDataset(images.train, ReadSettings(seed=0, max_steps=1, with_images=False)), accumulation=1
            )
            started = time.perf_counter()
            count = sum(1 for _ in data.windows(1))
            ordered = time.perf_counter() - started
            state = "met" if scanned + ordered < TARGET else "MISSED"
            print(
                f"{name}: {COUNT} images scanned and placed in {scanned:.2f} s, an epoch of {count} batches ordered in "
                f"{ordered:.2f} s; target {TARGET:.0f} s in all: {state}"
            )


if __name__ == "__main__":
    main()
