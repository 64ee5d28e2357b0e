"""What all tests share: one thread, no network, tiny models made once per run."""

import logging
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for place in (ROOT, ROOT / "tests"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402
from support.runs import Inputs  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Inputs:
    """Tiny checkpoints, tokenizers and photographs, written once."""
    return Inputs.write(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def without_jxl(monkeypatch):
    """As if the optional package for JPEG XL were not installed."""
    from library.data import images

    monkeypatch.setitem(sys.modules, "pillow_jxl", None)  # what makes an import fail
    for remembered in (images.optional_formats, images.extensions):
        remembered.cache_clear()
    yield
    for remembered in (images.optional_formats, images.extensions):
        remembered.cache_clear()


@pytest.fixture
def messages(caplog):
    """What the program said, as a list of texts."""
    logger = logging.getLogger("diffusion_scripts")
    before = logger.propagate
    logger.propagate = True
    caplog.set_level(logging.INFO, logger="diffusion_scripts")
    yield caplog
    logger.propagate = before
