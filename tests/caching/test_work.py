"""Reading, encoding and writing at the same time, shared by processes."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from library.base.errors import UserError
from library.batch import ItemAddress
from library.caching.latent_files import LatentLayout
from library.caching.latents import LatentFiles
from library.caching.pipeline import overlap
from library.config_util import resolve_datasets
from library.data.build import scan
from library.data.dataset import ReadSettings, TrainDataset
from library.data.records import ScanRules


def run(count=20, read=lambda n: n, compute=lambda n, content: content, write=None):
    written, done = [], []
    overlap(range(count), read, compute, write or (lambda n, result: written.append((n, result))), done.append)
    return written, done


def test_every_piece_goes_through_in_order():
    written, done = run(read=lambda n: n * 10, compute=lambda n, content: content + 1)
    assert written == [(n, n * 10 + 1) for n in range(20)]
    assert done == list(range(20))
    assert run(count=0) == ([], [])


@pytest.mark.parametrize("where", ["read", "compute", "write"])
@pytest.mark.parametrize("piece", [0, 10, 19])
def test_what_goes_wrong_is_raised(where, piece):
    def fail(n, *content):
        if n == piece:
            raise ValueError(f"{where} {n}")
        return n

    with pytest.raises(ValueError, match=f"{where} {piece}"):
        run(**{where: fail})


def test_reading_computing_and_writing_overlap():
    """Each takes 10 ms a piece; one after the other would take 30."""
    started = time.perf_counter()
    run(read=lambda n: time.sleep(0.01), compute=lambda n, _: time.sleep(0.01), write=lambda n, _: time.sleep(0.01))
    assert time.perf_counter() - started < 20 * 0.024


def test_only_a_few_results_wait_to_be_written():
    """What waits is lost when the process is killed."""
    waiting, most, lock = 0, 0, threading.Lock()

    def compute(n, _):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)

    def write(n, _):
        nonlocal waiting
        time.sleep(0.003)
        with lock:
            waiting -= 1

    run(count=60, compute=compute, write=write)
    assert 2 <= most <= 7


class Averages:
    """The simplest encoder: means of 8 x 8 pixels in four channels. Remembers what it was asked for."""

    def __init__(self):
        self.keys = []

    def encode(self, images, items):
        self.keys += [item.key for item in items]
        small = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat((small, small[:, :1]), dim=1)


@pytest.fixture
def dataset(tmp_path):
    for number in range(11):
        size = (128, 64) if number % 3 else (64, 128)
        Image.fromarray(np.full((*size[::-1], 3), number * 20, np.uint8)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("x")
    shared = {"enable_bucket": True, "min_bucket_reso": 64, "bucket_reso_steps": 64, "batch_size": 2}
    subset = {"image_dir": str(tmp_path), "caption_extension": ".txt"}
    config = {"datasets": [{"resolution": size, **shared, "subsets": [subset]} for size in (64, 96)]}
    images = scan(resolve_datasets(config, {}), source="test", seed=0, step=64, rules=ScanRules())
    return TrainDataset(images.train, ReadSettings(seed=0, max_steps=1, with_images=True))


def files_of(dataset):
    files = LatentFiles(dataset, LatentLayout(suffix="_sd", channels=4), 8, ("averages",))
    files.survey(show_progress=False)
    return files


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_work_by_file(dataset, world_size):
    """No image is encoded twice, and both sizes of an image are written by one process."""
    shares = []
    for rank in range(world_size):
        encoder = Averages()
        # each process looks before any has begun, or after others have finished some: the shares are the same
        files_of(dataset).fill(encoder, batch_size=3, rank=rank, world_size=world_size, show_progress=False)
        shares.append(encoder.keys)
    assert sorted(sum(shares, [])) == sorted([f"{n}.png" for n in range(11)] * 2)
    assert all(not set(a) & set(b) for n, a in enumerate(shares) for b in shares[:n])
    files = files_of(dataset)
    assert not files.pending()
    reader = files.reader()
    for (number, index), found in files.found.items():
        record = dataset.sets[number].records[index]
        value = int(record.key.removesuffix(".png")) * 20 / 127.5 - 1
        latents, mask = reader.read(ItemAddress(number, 0, index, record.key, 0, 0), flipped=False)
        assert mask is None and found.status.usable
        assert torch.allclose(latents, torch.full_like(latents, value), atol=1e-5)


def test_what_no_process_made_is_named(dataset):
    files = files_of(dataset)
    files.fill(Averages(), batch_size=3, rank=0, world_size=2, show_progress=False)
    with pytest.raises(UserError, match="another process should have made it"):
        files.reader()


def test_a_cache_that_is_damaged_while_training_is_named(dataset, tmp_path):
    files = files_of(dataset)
    files.fill(Averages(), batch_size=3, show_progress=False)
    reader = files.reader()
    path = files.found[0, 0].path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read any more"):
        reader.read(ItemAddress(0, 0, 0, "0.png", 0, 0), flipped=False)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read any more"):
        reader.read(ItemAddress(0, 0, 0, "0.png", 0, 0), flipped=False)


def test_a_folder_that_cannot_be_written_is_named(dataset, tmp_path):
    """A folder stands where the file should go."""
    files = files_of(dataset)
    (tmp_path / "5_0128x0064_sd.npz").mkdir()
    with pytest.raises(UserError, match="5_0128x0064_sd.npz: cannot be written: .*use --cache_latents alone"):
        files.fill(Averages(), batch_size=3, show_progress=False)
    assert not list(tmp_path.glob(".*.tmp"))
