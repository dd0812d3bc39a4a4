"""Real weights and pictures, where folders are named."""

import os
from pathlib import Path

import cv2
import pytest
import torch


@pytest.fixture(scope="session")
def imagenet():
    """Torchvision's weights, named by CCNET_IMAGENET."""
    folder = os.environ.get("CCNET_IMAGENET")
    if not folder:
        pytest.skip("CCNET_IMAGENET does not name the folder of ImageNet weights")
    return Path(folder)


@pytest.fixture(scope="session")
def camvid_picture(camvid):
    """A real picture, (1,3,H,W) in 0..255, RGB."""
    first = sorted((camvid / "train").iterdir())[0]
    image = cv2.imread(str(first))[200:280, 300:400, ::-1]
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].double()
