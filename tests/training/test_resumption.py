"""What a resumed run takes from a checkpoint, and what stays the command line's."""

import pytest
import torch
from torch import nn

from dataset import DATASETS
from training.recipes import Recipe
from training.resumption import Resumed, check_same_start, restore, run_state
from training.step import TrainStep, build_optimizer
from utils.arguments import UsageError
from utils.checkpoint import CheckpointError
from utils.distributed import PeerError, Process

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
    recipe = Recipe().with_changes({"mean": (1.0, 2.0, 3.0)}, {})
    with pytest.raises(UsageError, match=r"--mean \(1\.0, 2\.0, 3\.0\) contradicts"):
        restore(resumed(tmp_path), step_of(Groups()), recipe, "the images")


def test_momentum_gets_the_strides_of_its_parameter(tmp_path):
    """A tool that copies a checkpoint may have lost them, and the fused optimiser does not look at them."""
    now = step_of(Groups())
    now.network.b.data = now.network.b.data.t()
    momentum = torch.arange(4.0).view(2, 2)
    optimizer = resumed(tmp_path).checkpoint["optimizer"]
    optimizer["state"][1]["momentum_buffer"] = momentum
    restore(resumed(tmp_path, optimizer=optimizer), now, Recipe(), "the images")
    found = now.optimizer.state[now.network.b]["momentum_buffer"]
    assert found.stride() == now.network.b.stride() == (1, 2)
    assert torch.equal(found, momentum)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"data": "5 images"},
            CheckpointError,
            "4 images at step 3, but process 1 has 5 images at step 3; all",
        ),
        ({"step": 0}, CheckpointError, "4 images at step 3, but process 1 has 4 images at step 0; all"),
        ({"recipe": Recipe(ohem_thres=0.5)}, UsageError, "process 1 .* other settings: ohem_thres 0.7 → 0.5"),
        ({"options": {"val_every": 0}}, UsageError, "process 1 .* other settings: val_every 2 → 0"),
    ],
)
def test_processes_that_were_started_otherwise(change, error, message):
    """As on several machines, whose command lines and files may differ."""
    start = {"data": "4 images", "step": 3, "recipe": Recipe(), "options": {"val_every": 2}}
    gathered = []

    class Gathering(Process):
        def all_gather_object(self, value):
            gathered.append(value)
            return gathered if len(gathered) > 1 else [value, value]

    check_same_start(Gathering((CPU,), 0, 2), **start)
    with pytest.raises(error, match=message):
        check_same_start(Gathering((CPU,), 0, 2), **(start | change))
    with pytest.raises(PeerError):
        check_same_start(Gathering((CPU,), 1, 2), **start)


@pytest.mark.parametrize("asked", [True, False])
def test_the_embedding_of_the_category_consistent_loss_neither_comes_nor_goes(tmp_path, asked):
    before = resumed(tmp_path, Recipe(ccl=not asked))
    with pytest.raises(UsageError, match=rf"--ccl {asked} contradicts .*x\.pth, which has {not asked}$"):
        restore(before, step_of(Groups()), Recipe(ccl=asked), "the images")
