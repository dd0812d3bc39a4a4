"""Checkpoints: atomic, complete, never executed, refused where they do not fit."""

import pickle
import random
import resource
import signal

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_weights,
    model_state,
    random_state,
    save_checkpoint,
    set_random_state,
)
from utils.snapshots import check_room


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))


def test_round_trip(tmp_path):
    contents = {
        "model": network().state_dict(),
        "step": 7,
        "settings": {"lr": 0.1, "size": (3, 4), "x": None},
    }
    path = tmp_path / "CS_scenes_7.pth"
    save_checkpoint(contents, path)
    assert [p.name for p in tmp_path.iterdir()] == ["CS_scenes_7.pth"]
    loaded = load_checkpoint(path)
    assert loaded["settings"] == contents["settings"]
    assert all(torch.equal(loaded["model"][n], x) for n, x in contents["model"].items())


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    """A real limit on the size of files: the write stops half-way, as on a full disk."""
    contents = {"model": {"x": torch.zeros(300_000)}}
    path = tmp_path / "run_1.pth"
    save_checkpoint(contents, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        for step in (1, 2):
            with pytest.raises(
                CheckpointError, match=rf"run_{step}.pth: cannot save .*earlier ones are kept"
            ):
                save_checkpoint(contents, tmp_path / f"run_{step}.pth")
        with pytest.raises(CheckpointError, match="cannot write a checkpoint of 1 MiB"):
            check_room(tmp_path, 1_200_000, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["run_1.pth"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("fault", ["truncated", "another step"])
def test_what_was_written_is_read_back_before_it_replaces_anything(tmp_path, monkeypatch, fault):
    """A disk that reports success but holds something else."""
    path, contents = tmp_path / "run_2.pth", {"model": network().state_dict(), "step": 2}
    save_checkpoint(contents, path)
    before, write = path.read_bytes(), torch.save

    def damaged(contents, file):
        write(contents | {"step": 1} if fault == "another step" else contents, file)
        if fault == "truncated":
            file.truncate(file.tell() - 100)

    monkeypatch.setattr(torch, "save", damaged)
    with pytest.raises(CheckpointError, match=r"run_2.pth: cannot save the checkpoint \(what was written"):
        save_checkpoint(contents, path)
    assert [p.name for p in tmp_path.iterdir()] == ["run_2.pth"]
    assert path.read_bytes() == before


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_pickled_objects_are_refused_not_run(tmp_path, save):
    save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(CheckpointError, match=r"bomb.pth: refused, it holds pickled objects"):
        load_checkpoint(tmp_path / "bomb.pth")


@pytest.mark.parametrize("kept", [0, 10, 1000, -100])
def test_truncated_file(tmp_path, kept):
    path = tmp_path / "run_1.pth"
    save_checkpoint({"model": network().state_dict()}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"run_1.pth: not a readable checkpoint, truncated"):
        load_checkpoint(path)


def test_missing_file_and_other_contents(tmp_path):
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(
        CheckpointError, match=r"page\.pth: not a readable checkpoint, truncated or of another"
    ):
        load_checkpoint(tmp_path / "page.pth")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        load_checkpoint(tmp_path / "list.pth")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "step": 3},
        lambda state: {"state_dict": state, "epoch": 1},
        lambda state: {f"module.{name}": x for name, x in state.items()},
        lambda state: {"state_dict": {f"module.{name}": x for name, x in state.items()}},
        lambda state: state | {"0.num_batches_tracked": torch.tensor(5)},
    ],
)
def test_every_usual_wrapping_is_understood(tmp_path, wrap):
    source, target = network(), network()
    torch.save(wrap(dict(source.state_dict())), tmp_path / "x.pth")
    path = tmp_path / "x.pth"
    load_weights(target, model_state(load_checkpoint(path)), path)
    assert all(torch.equal(x, source.state_dict()[n]) for n, x in target.state_dict().items())


def test_a_file_that_does_not_fit_is_refused_whole(tmp_path):
    model = network()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = {
        "0.weight": torch.zeros(4, 3, 1, 1),
        "1.weight": torch.zeros(9, 4, 1, 1),
        "extra": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, state, tmp_path / "other.pth")
    assert str(caught.value).endswith(
        "other.pth: does not fit this network; 2 missing: 0.bias, 1.bias; 1 unexpected: extra; "
        "1 of another shape: 1.weight (9, 4, 1, 1) instead of (2, 4, 1, 1)"
    )
    assert "\n" not in str(caught.value)
    assert all(torch.equal(x, before[n]) for n, x in model.state_dict().items())


def test_a_backbone_file_may_lack_the_head_and_nothing_else(tmp_path):
    model = network()
    state = {"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.ones(4), "fc.weight": torch.ones(2)}
    load_weights(model, state, tmp_path, may_lack=("1.",), skip=("fc.",))
    assert model[0].weight.eq(1).all()
    del state["0.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: 0\.bias"):
        load_weights(model, state, tmp_path, may_lack=("1.",), skip=("fc.",))


def test_random_states_survive_a_checkpoint(tmp_path):
    path = tmp_path / "run_1.pth"
    save_checkpoint({"random_states": [random_state(torch.device("cpu"))]}, path)

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    expected = draw()
    set_random_state(load_checkpoint(path)["random_states"][0], torch.device("cpu"))
    assert draw() == expected
