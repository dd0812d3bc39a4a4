"""What a resumed run takes from a checkpoint, and what stays the command line's."""

import pytest
import torch
from torch import nn

from dataset import DATASETS
from training.recipes import Recipe
from training.resumption import Resumed, restore, run_state
from training.step import TrainStep, build_optimizer
from utils.arguments import UsageError
from utils.checkpoint import CheckpointError
from utils.distributed import Process

CPU = torch.device("cpu")


class Groups(nn.Module):
    """Two parameters; the second has a rate and a decay of its own."""

    def __init__(self, rate=1.0, decay=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))
        self.rate, self.decay = rate, decay

    def parameter_groups(self):
        return [{"params": [self.a]}, {"params": [self.b], "lr": self.rate, "weight_decay": self.decay}]


def step_of(network, recipe=Recipe()):  # noqa: B008
    optimizer = build_optimizer(network, recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    return TrainStep(network, None, optimizer, Process((CPU,)))


def resumed(tmp_path, recipe=Recipe(), **change):  # noqa: B008
    step = step_of(Groups())
    for parameter in step.network.parameters():
        step.optimizer.state[parameter]["momentum_buffer"].fill_(7.0)
    contents = run_state(step, 5, recipe, DATASETS["cityscapes"], "the images") | change
    return Resumed(tmp_path / "x.pth", contents, recipe, "the images")


def test_each_group_keeps_its_own_rate_and_decay(tmp_path):
    """Those of this command line, not of the checkpoint and not of the first group."""
    now = step_of(Groups(rate=0.5, decay=0.25), recipe := Recipe(weight_decay=0.125, momentum=0.5))
    assert restore(resumed(tmp_path), now, recipe, "the images") == 5
    options = [
        (group["initial_lr"], group["weight_decay"], group["momentum"])
        for group in now.optimizer.param_groups
    ]
    assert options == [(0.01, 0.125, 0.5), (0.5, 0.25, 0.5)]
    assert all((now.optimizer.state[p]["momentum_buffer"] == 7).all() for p in now.network.parameters())


@pytest.mark.parametrize("step", [-5, 2.0, True, "5", None])
def test_a_step_that_is_none(tmp_path, step):
    with pytest.raises(CheckpointError, match="its contents are damaged \\(step "):
        restore(resumed(tmp_path, step=step), step_of(Groups()), Recipe(), "the images")


def test_momentum_of_another_shape(tmp_path):
    """The fused optimiser would read beyond it."""
    optimizer = resumed(tmp_path).checkpoint["optimizer"]
    optimizer["state"][1]["momentum_buffer"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"momentum of shape \(1,\) for \(2, 2\)"):
        restore(resumed(tmp_path, optimizer=optimizer), step_of(Groups()), Recipe(), "the images")


def test_other_images_and_another_network(tmp_path):
    with pytest.raises(CheckpointError, match=r"other data \(the images, not others\)"):
        restore(resumed(tmp_path), step_of(Groups()), Recipe(), "others")
    recipe = Recipe().with_changes({"backbone": "resnet18"}, {})
    with pytest.raises(UsageError, match=r"--backbone resnet18 contradicts .*x\.pth, which has resnet101"):
        restore(resumed(tmp_path), step_of(Groups()), recipe, "the images")


@pytest.mark.parametrize("asked", [True, False])
def test_the_embedding_of_the_category_consistent_loss_neither_comes_nor_goes(tmp_path, asked):
    before = resumed(tmp_path, Recipe(ccl=not asked))
    with pytest.raises(UsageError, match=rf"--ccl {asked} contradicts .*x\.pth, which has {not asked}$"):
        restore(before, step_of(Groups()), Recipe(ccl=asked), "the images")
