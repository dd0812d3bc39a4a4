"""Which batches can be computed on which devices."""

from pathlib import Path

import pytest
import torch

from networks import HEADS, NetworkConfig, build_model
from networks.resnet import STEMS
from training import options as module
from training.options import RunOptions
from training.recipes import Recipe
from utils.arguments import UsageError


def check(gpu="cpu", network=None, **recipe):
    RunOptions(data_dir=Path("x"), gpu=gpu).check(Recipe(NetworkConfig(**network or {}), **recipe))


@pytest.mark.parametrize("model", HEADS)
def test_a_mean_of_one_image_cannot_be_normalised(model):
    """That of several processes or GPUs can, where the normalisation is synchronised, and that of a clip."""
    network = {"model": model}
    check(network=network, batch_size=2)
    check(network=network, batch_size=1, freeze_bn=True)
    check(network=network, batch_size=1, clip=2)
    check("0,1", network, batch_size=2)
    if model not in ("pspnet", "deeplabv3"):
        check(network=network, batch_size=1)
        return
    with pytest.raises(UsageError, match=f"--model {model} normalises .*: raise --batch-size$"):
        check(network=network, batch_size=1)
    with pytest.raises(UsageError, match=r"or lower --accumulate$"):
        check(network=network, batch_size=4, accumulate=4)
    with pytest.raises(UsageError, match=r"raise --batch-size or take --norm sync$"):
        check("0,1", network | {"norm": "abn"}, batch_size=2)


def test_processes_count_together(monkeypatch):
    monkeypatch.setattr(module, "world_size", lambda: 2)
    check(network={"model": "pspnet"}, batch_size=2)
    with pytest.raises(UsageError, match=r"or take --norm sync$"):
        check(network={"model": "pspnet", "norm": "inplace_abn"}, batch_size=2)


@pytest.mark.parametrize("stem", STEMS)
def test_features_are_counted_as_the_backbone_makes_them(stem):
    """A single one is refused."""
    network = {"backbone": "resnet18", "stem": stem}
    with torch.device("meta"):
        backbone = build_model(**network).backbone.eval()
        features = {side: backbone(torch.empty(1, 3, side, side))[1].shape[-1] for side in range(1, 20)}
    assert {1, 2, 3} <= set(features.values())
    for side, count in features.items():
        if count == 1:
            with pytest.raises(UsageError, match="one feature a batch has no variance"):
                check(network=network, batch_size=1, input_size=(side, side))
        else:
            check(network=network, batch_size=1, input_size=(side, side))
        assert module._feature_side(side, stem) == count
