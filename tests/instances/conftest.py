"""A tiny synthetic COCO, and a network small enough to be trained in a test."""

import json

import pytest

from instances.demo import write_split


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """6 + 4 synthetic images of 48×64, the last of each split without objects."""
    root = tmp_path_factory.mktemp("coco") / "shapes"
    write_split(root, "train2017", 6, 48, 64, seed=0)
    write_split(root, "val2017", 4, 48, 64, seed=1)
    return root


@pytest.fixture
def own_root(tmp_path):
    """A copy with 3 images that a test may spoil, and how to change its annotation file."""
    root = tmp_path / "coco"
    write_split(root, "train2017", 3, 48, 64, seed=2)
    file = root / "annotations" / "instances_train2017.json"

    def change(edit):
        contents = json.loads(file.read_text())
        edit(contents)
        file.write_text(json.dumps(contents))

    return root, change
