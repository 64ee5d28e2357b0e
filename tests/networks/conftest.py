"""Fixtures of the adapter tests."""

import pytest
import torch
from adapter_models import TinyUNet, randomise

from library.base.logs import logger


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def visible_log(monkeypatch):
    """Messages reach caplog, whatever set up logging before."""
    monkeypatch.setattr(logger, "propagate", True)


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return TinyUNet()


@pytest.fixture
def network(unet):
    """An applied network on the tiny U-Net, with random ups."""
    from networks import lora

    net = lora.create_network(1.0, 4, 2.0, None, None, unet)
    net.apply_to(None, unet, False, True)
    randomise(net)
    return net
