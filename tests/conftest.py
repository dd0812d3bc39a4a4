"""What several tests need: small data sets and real CamVid where its folder is named."""

import importlib
import os
import signal
from pathlib import Path

import pytest

from dataset.demo import generate
from tests.samples import write_pair


@pytest.fixture(autouse=True)
def interruptible():
    """A script that was run in this process leaves it deaf to Ctrl-C."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory):
    """A tiny synthetic Cityscapes: 4 + 3 scenes of 64×128."""
    root = tmp_path_factory.mktemp("data") / "demo"
    generate(root, num_train=4, num_val=3, height=64, width=128)
    return root


@pytest.fixture(scope="session")
def camvid():
    """The real CamVid, named by CCNET_CAMVID."""
    folder = os.environ.get("CCNET_CAMVID")
    if not folder:
        pytest.skip("CCNET_CAMVID does not name CamVid's folder")
    if not (Path(folder) / "train.txt").is_file():
        pytest.fail(f"CCNET_CAMVID={folder} holds no train.txt")
    return Path(folder)


@pytest.fixture
def list_data(tmp_path):
    """A folder with three pairs of three classes and its list file."""
    root = tmp_path / "own data"
    lines = [write_pair(root, f"scene {index}", seed=index) for index in range(3)]
    (root / "train.lst").write_text("".join(lines))
    return root


@pytest.fixture
def replicate(monkeypatch):
    """PyTorch's own ``replicate``; its two steps that want GPUs, devices and broadcast, are replaced."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def broadcast(tensors, devices, detach=False):
        first = list(tensors) if detach else [tensor.clone() for tensor in tensors]  # buffers: the originals
        return [first] + [
            [tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices[1:]
        ]

    monkeypatch.setattr(module, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", broadcast)
    return lambda network, count: module.replicate(network, ["cpu"] * count)
