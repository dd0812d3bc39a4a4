"""Which network a file is of: by its settings, and by the names and shapes of its weights."""

import pytest
import torch

from networks import HEADS, NetworkConfig, build_model, load_model
from networks.recognition import told_by
from networks.resnet import STEMS
from utils.checkpoint import CheckpointError


def tiny(**settings):
    return build_model(**{"backbone": "resnet18", "num_classes": 3, **settings})


def same(model, other, names):
    return all(torch.equal(other.state_dict()[name], model.state_dict()[name]) for name in names)


def test_load_model_understands_every_kind_of_our_checkpoints(tmp_path):
    """Flat settings of earlier checkpoints, a NetworkConfig alone or within a recipe, a plain state dict."""
    model, path = tiny(recurrence=1, norm="abn"), tmp_path / "x.pth"
    config = NetworkConfig(backbone="resnet18", num_classes=3, recurrence=1)
    flat = {
        "model": "ccnet",
        "num_classes": 3,
        "backbone": "resnet18",
        "recurrence": 1,
        "norm": "sync",
        "lr": 2,
    }
    for beside in (
        {"settings": flat},
        {"network": config.to_dict()},
        {"recipe": {"network": config.to_dict(), "power": 0.9}},
    ):
        torch.save({"model": model.state_dict(), "step": 3, **beside}, path)
        loaded, found = load_model(path)
        assert found == config
        assert not loaded.training
        assert same(model, loaded, model.state_dict())
    assert load_model(path, recurrence=3)[0].head.recurrence == 3
    plain = tiny(stem="plain")
    torch.save({"model": plain.state_dict(), "settings": {"num_classes": 3, "recurrence": 1}}, path)
    assert load_model(path)[1] == NetworkConfig(
        backbone="resnet18", num_classes=3, recurrence=1, stem="plain"
    )
    torch.save(model.state_dict(), path)
    assert load_model(path)[1] == NetworkConfig(backbone="resnet18", num_classes=3)  # R as published
    for stem in STEMS:
        torch.save(tiny(stem=stem, num_classes=5).state_dict(), path)
        assert load_model(path)[1] == NetworkConfig(backbone="resnet18", num_classes=5, stem=stem)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ({"recurrence": 2.5}, "recurrence must be a whole number; got 2.5"),
        ({"depth": 4}, "NetworkConfig has no field depth"),
        ({"model": "fcn", "recurrence": 1}, "recurrence=1 is an option of ccnet; model fcn has none"),
        (7, "network is int, not a dict of settings"),
    ],
)
def test_settings_that_make_no_network(tmp_path, network, reason):
    torch.save({"model": {"x": torch.zeros(1)}, "network": network}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"x.pth: its settings make no network .{reason}"):
        load_model(tmp_path / "x.pth")


@pytest.mark.parametrize("recurrence", [1, 2])
def test_rounds_of_a_network_that_has_none(tmp_path, recurrence):
    torch.save(tiny(model="fcn").state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x.pth: .*\(recurrence is given, model fcn has none\)"):
        load_model(tmp_path / "x.pth", recurrence=recurrence)


@pytest.mark.parametrize("model", HEADS)
def test_the_head_of_a_state_dict_is_told_by_its_names(tmp_path, model):
    network = build_model(model, backbone="resnet18", num_classes=3)
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    loaded, config = load_model(tmp_path / "plain.pth")
    assert (config.model, config.num_classes) == (model, 3)
    assert type(loaded.head) is type(network.head)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_backbones_are_told_by_their_blocks(backbone):
    with torch.device("meta"):
        state = build_model(backbone=backbone).state_dict()
    assert told_by({}, state)["backbone"] == backbone
