"""ABN against its formula in float64."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from libs import ABN, InPlaceABN, InPlaceABNSync, fold, freeze, replace_by_batch_norm, to_batch_norm
from libs.modules import keep_statistics

CLASSES = [ABN, InPlaceABN, InPlaceABNSync]
ACTIVATIONS = {
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "elu": lambda x: torch.where(x > 0, x, 0.01 * (x.exp() - 1)),
    "identity": lambda x: x,
}


def by_formula(layer, x, mean, var):
    """φ((x - mean) / √(var + eps) · (|weight| + eps) + bias)."""
    view = (1, -1) + (1,) * (x.dim() - 2)
    out = (x - mean.view(view)) / (var.view(view) + layer.eps).sqrt()
    if layer.affine:
        out = out * (layer.weight.abs() + layer.eps).view(view) + layer.bias.view(view)
    return ACTIVATIONS[layer.activation](out)


def make(kind, affine=True, activation="leaky_relu", channels=5):
    layer = kind(channels, affine=affine, activation=activation).double()
    if affine:  # negative and tiny weights are where |weight| + eps shows
        layer.weight.data = torch.tensor([-1.5, 1e-6, 0.7, -1e-3, 2.0], dtype=torch.float64)[:channels]
        layer.bias.data = torch.linspace(-1, 1, channels, dtype=torch.float64)
    return layer


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 7, 9), (2, 5, 1, 1), (4, 5, 11), (6, 5)])
def test_training_and_evaluation_follow_the_formula(kind, activation, affine, shape):
    layer = make(kind, affine, activation)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = x.mean(dims), x.var(dims, correction=0)
    torch.testing.assert_close(layer(x.clone()), by_formula(layer, x, mean, var))
    torch.testing.assert_close(layer.running_mean, 0.1 * mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * x.var(dims, correction=1))
    layer.eval()
    torch.testing.assert_close(layer(x.clone()), by_formula(layer, x, layer.running_mean, layer.running_var))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation):
    layer = make(ABN, activation=activation)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", CLASSES)
def test_state_dict_is_the_references(kind):
    assert list(kind(3).state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    assert list(kind(3, affine=False).state_dict()) == ["running_mean", "running_var"]


def test_equals_batch_norm_for_positive_weights():
    layer, plain = ABN(5, activation="identity"), nn.BatchNorm2d(5)
    plain.weight.data = layer.weight.data.abs() + layer.eps
    x = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(layer(x), plain(x))


def test_unknown_activation():
    with pytest.raises(ValueError, match="got 'gelu'"):
        ABN(3, activation="gelu")


def test_there_is_no_cumulative_average():
    with pytest.raises(ValueError, match="momentum must be a number; got None"):
        InPlaceABN(3, momentum=None)


PARTS = ((0, 2), (2, 3))  # unequal parts of a batch of 3


def run_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = torch.load(folder / "batch.pt")
    layer = make(InPlaceABNSync)
    x = whole["x"][slice(*PARTS[rank])].clone().requires_grad_()
    out = layer(x * 1)
    out.backward(whole["grad"][slice(*PARTS[rank])])
    parameters = {"weight": layer.weight.grad, "bias": layer.bias.grad}
    for value in parameters.values():
        dist.all_reduce(value)
    result = {"out": out.detach(), "dx": x.grad, "var": layer.running_var, "mean": layer.running_mean}
    torch.save(result | parameters, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    x, grad = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    torch.save({"x": x, "grad": grad}, tmp_path / "batch.pt")
    torch.multiprocessing.start_processes(run_rank, (tmp_path,), 2, start_method="forkserver")

    layer, joined = make(ABN), x.clone().requires_grad_()
    out = layer(joined)
    out.backward(grad)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def same(got, want):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)

    same(torch.cat([r["out"] for r in ranks]), out.detach())
    same(torch.cat([r["dx"] for r in ranks]), joined.grad)
    for result in ranks:
        same(result["weight"], layer.weight.grad)
        same(result["bias"], layer.bias.grad)
        same(result["mean"], layer.running_mean)
        same(result["var"], layer.running_var)


def test_activations_here_are_pytorchs():
    x = torch.randn(100)
    torch.testing.assert_close(ACTIVATIONS["elu"](x), F.elu(x, 0.01))
    torch.testing.assert_close(ACTIVATIONS["leaky_relu"](x), F.leaky_relu(x, 0.01))


def test_a_frozen_layer_stays_frozen_as_batch_norm():
    layer = ABN(4, activation="identity")
    assert all(x.requires_grad for x in to_batch_norm(layer).parameters())
    layer.freeze()
    norm = to_batch_norm(layer)
    assert not norm.training and not any(x.requires_grad for x in norm.parameters())
    norm.train()(torch.randn(3, 4, 5, 5) + 1)
    assert not norm.running_mean.any()


@pytest.mark.parametrize("kind", [ABN, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_frozen_layers_stay_frozen(kind):
    """PyTorch's too, which a backbone of one's own may have; copies as well."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), kind(4))
    for _ in range(2):
        freeze(network)
    assert len(network[1]._forward_pre_hooks) <= 1
    network = copy.deepcopy(network.train())
    state = copy.deepcopy(network[1].state_dict())
    network(torch.randn(2, 3, 5, 6)).sum().backward()
    for name, value in network[1].state_dict().items():
        assert torch.equal(value, state[name])
    assert network[0].weight.grad is not None
    assert all(x.grad is None and not x.requires_grad for x in network[1].parameters())


@pytest.mark.parametrize("kind", [ABN, InPlaceABN])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_running_statistics_of_every_type_move(kind, dtype):
    layer = kind(3, momentum=0.25).to(dtype)
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64) + 2
    layer((x * 1).to(dtype))
    mean, var = 0.25 * x.mean((0, 2, 3)), 0.75 + 0.25 * x.transpose(0, 1).flatten(1).var(1)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=0.01, atol=0.01)


def test_statistics_are_kept_for_a_second_pass():
    layer = ABN(3, momentum=0.3, activation="identity")
    before = copy.deepcopy(layer.state_dict())
    with keep_statistics(layer):
        layer(torch.randn(2, 3, 4))
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert layer.momentum == 0.3
    assert to_batch_norm(layer).momentum == 0.3


def test_every_layer_within_a_module_becomes_a_batch_norm():
    shared = ABN(4, activation="identity")
    network = nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.Sequential(nn.Conv2d(4, 4, 1), shared)).eval()
    x = torch.randn(2, 4, 3, 3)
    want = network(x)
    replace_by_batch_norm(network)
    assert not any(isinstance(layer, ABN) for layer in network.modules())
    assert network[1] is network[2][1]
    torch.testing.assert_close(network(x), want)
    assert isinstance(replace_by_batch_norm(ABN(4, activation="identity")), nn.BatchNorm2d)


@pytest.mark.parametrize("conv", [nn.ConvTranspose2d(4, 4, 1), nn.Conv2d(4, 1, 1), nn.Conv3d(4, 4, 1)])
def test_what_cannot_be_folded_is_refused(conv):
    with pytest.raises(ValueError, match="an ABN of 4 channels cannot be folded into Conv"):
        fold(conv, ABN(4))
