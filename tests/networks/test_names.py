"""The reference's names in state dicts, whatever becomes of the network."""

import copy
import io
import os

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from libs import ABN
from networks import build_model
from networks.names import from_batch_norm


@pytest.fixture(scope="module")
def model():
    return build_model(backbone="resnet18", num_classes=3)


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


REFERENCE = (
    "conv1.weight",
    "layer4.1.bn2.bias",
    "head.conva.0.weight",
    "head.bottleneck.3.bias",
    "dsn.1.bias",
)


@pytest.mark.parametrize(
    "change", [copy.deepcopy, pickled, lambda model: copy.deepcopy(copy.deepcopy(model))]
)
def test_copies_load_and_store_the_same_names(model, change):
    state = model.state_dict()
    other = change(model)
    assert list(other.state_dict()) == list(state)
    assert set(REFERENCE) < set(state)
    changed = {name: x + 1 for name, x in state.items()}
    assert str(other.load_state_dict(changed)) == "<All keys matched successfully>"
    assert all(torch.equal(x, changed[name]) for name, x in other.state_dict().items())
    assert not any(
        torch.equal(x, changed[name]) for name, x in model.state_dict().items()
    )  # no shared memory


def test_wrappers(model, replicate):
    names = list(model.state_dict())
    images = torch.randn(1, 3, 33, 41)
    expected = model.eval()(images)["out"]
    for replica in replicate(model, 2):
        assert torch.equal(replica(images)["out"], expected)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(copy.deepcopy(model))
        state = wrapped.state_dict()
        assert list(state) == [f"module.{name}" for name in names]
        wrapped.load_state_dict({name: x * 2 for name, x in state.items()})
        assert torch.equal(wrapped.module.head.classifier.bias, 2 * model.head.classifier.bias)
    finally:
        dist.destroy_process_group()
    compiled = torch.compile(copy.deepcopy(model))
    assert list(compiled.state_dict()) == [f"_orig_mod.{name}" for name in names]


def test_unknown_and_missing_names_are_errors(model):
    state = dict(model.state_dict())
    state["head.more.weight"] = state.pop("head.bottleneck.3.weight")
    state["conv9.weight"] = torch.zeros(1)
    incompatible = copy.deepcopy(model).load_state_dict(state, strict=False)
    assert incompatible.missing_keys == ["head.bottleneck.3.weight"]
    assert sorted(incompatible.unexpected_keys) == ["conv9.weight", "head.more.weight"]


def test_parameters_are_in_the_order_of_the_references_state_dict(model):
    """Optimiser states of earlier checkpoints are loaded by index."""
    stored = {id(x): name for name, x in model.state_dict(keep_vars=True).items()}
    names = [stored[id(parameter)] for parameter in model.parameters()]
    order = [names.index(name) for name in (*REFERENCE[:2], "head.conva.0.weight", "head.cca.gamma")]
    order += [names.index(f"head.{x}.0.weight") for x in ("convb", "bottleneck")]
    order += [
        names.index(name) for name in ("head.bottleneck.3.bias", "dsn.0.bias", "dsn.1.bias", "dsn.3.bias")
    ]
    assert order == sorted(order)
    assert names[0] == "conv1.weight"
    assert names[-1] == "dsn.3.bias"
    assert len(names) == len(list(model.parameters()))


def test_what_is_whose(model):
    backbone = model.backbone_names()
    assert {name.split(".")[0] for name in model.state_dict() if name not in backbone} == {"head", "dsn"}
    assert model.classifier_names() == (
        "head.bottleneck.3.weight",
        "head.bottleneck.3.bias",
        "dsn.3.weight",
        "dsn.3.bias",
    )


def test_batch_norm_of_a_negative_weight_behind_a_bias():
    """The auxiliary head's convolution has a bias, whose sign turns with its weights'."""
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 4, 3).double(), torch.nn.BatchNorm2d(4).double().eval()
    norm.weight.data = torch.tensor([-1.5, 0.7, -1e-7, 2.0]).double()
    norm.bias.data.normal_()
    norm.running_mean.normal_()
    state = {f"dsn.0.{name}": value for name, value in conv.state_dict().items()}
    state |= {f"dsn.1.{name}": value for name, value in norm.state_dict().items()}
    converted = from_batch_norm(state, {"dsn.1."})
    abn = ABN(4, activation="identity").double().eval()
    other = torch.nn.Conv2d(3, 4, 3).double()
    for layer, prefix in ((other, "dsn.0."), (abn, "dsn.1.")):
        layer.load_state_dict({name: converted[prefix + name] for name in layer.state_dict()})
    x = torch.randn(2, 3, 6, 5).double()
    torch.testing.assert_close(abn(other(x)), norm(conv(x)), rtol=1e-4, atol=1e-4)
