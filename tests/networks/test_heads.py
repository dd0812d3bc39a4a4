"""The heads that criss-cross attention is compared with: each against its formula, and what they share."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from networks import HEADS, NetworkConfig, build_model
from networks.heads.aspp import ASPP
from networks.heads.gcn import GlobalConvolution
from networks.heads.non_local import NonLocalAttention
from networks.heads.psp import PyramidPooling


def batch_norm(channels):
    return nn.BatchNorm2d(channels).eval()


def features(channels=16, size=(7, 9)):
    torch.manual_seed(0)
    return torch.randn(2, channels, *size, dtype=torch.float64)


@pytest.mark.parametrize("explicit", [False, True])
def test_non_local_is_softmax_over_all_positions_without_scaling(explicit):
    x = features()
    layer = NonLocalAttention(16, explicit).double()
    layer.gamma.data.fill_(0.7)
    for conv in (layer.query_conv, layer.key_conv):
        conv.weight.data *= 4  # far from uniform attention
    query, key, value = layer.query_conv(x), layer.key_conv(x), layer.value_conv(x)
    weights = torch.einsum("bcij,bckl->bijkl", query, key).flatten(3).softmax(3).unflatten(3, (7, 9))
    expected = x + layer.gamma * torch.einsum("bijkl,bckl->bcij", weights, value)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    wanted, grad = list(layer.parameters()), torch.randn_like(x)
    for got, want in zip(*(torch.autograd.grad(y, wanted, grad) for y in (layer(x), expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_non_local_does_not_store_the_attention_by_default():
    size, stored = (24, 25), {}
    for explicit in (False, True):
        layer, sizes = NonLocalAttention(16, explicit), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            layer(torch.randn(1, 16, *size))
        stored[explicit] = max(sizes)
    assert stored[True] == (24 * 25) ** 2
    assert stored[False] <= 16 * 24 * 25


def test_pyramid_pooling_is_the_formula():
    x = features(size=(11, 7))
    layer = PyramidPooling(16, batch_norm).double()
    out = layer(x)
    assert torch.equal(out[:, :16], x)
    for index, bins in enumerate((1, 2, 3, 6)):
        rows, columns = (
            [slice(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)] for n in (11, 7)
        )
        means = [x[:, :, row, column].mean((2, 3)) for row in rows for column in columns]
        cells = torch.stack(means, -1).unflatten(2, (bins, bins))
        part = layer.branches[index](cells)
        expected = F.interpolate(part, (11, 7), mode="bilinear", align_corners=True)
        torch.testing.assert_close(out[:, 16 + 4 * index : 20 + 4 * index], expected)


def test_aspp_sees_rates_12_24_36_and_the_mean():
    layer = ASPP(16, batch_norm).double()
    x = torch.zeros(1, 16, 81, 81, dtype=torch.float64)
    x[:, :, 40, 40] = 1
    out = layer(x)
    assert out.shape == (1, 40, 81, 81)
    for index, rate in enumerate((12, 24, 36), start=1):
        seen = out[0, 8 * index : 8 * index + 8].abs().sum(0).nonzero().tolist()
        assert seen == [[40 + i * rate, 40 + j * rate] for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert out[0, :8].abs().sum(0).nonzero().tolist() == [[40, 40]]
    torch.testing.assert_close(out[:, 32:, 5, 3], layer.image(x.mean((2, 3), keepdim=True))[:, :, 0, 0])


def test_global_convolution_is_a_15_by_15_convolution():
    layer = GlobalConvolution(16).double()
    x = features(size=(20, 18))
    kernel, bias = torch.zeros(16, 16, 15, 15, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    (down, across), (across2, down2) = layer.left, layer.right
    for first, second in ((down, across), (across2, down2)):
        one, two = (conv.weight.flatten(2) for conv in (first, second))
        equation = "mck,oml->ockl" if first is down else "mcl,omk->ockl"
        kernel = kernel + torch.einsum(equation, one, two)
        bias = bias + second.bias
        first.bias.data.zero_()  # at the border a bias between the two is not a convolution's
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, bias, padding=7))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains_and_evaluates(name):
    torch.manual_seed(0)
    model = build_model(name, backbone="resnet18", num_classes=3, embedding_channels=16)
    images = torch.randn(2, 3, 33, 41).to(memory_format=torch.channels_last)
    keys = torch.tensor([1, 2])
    outputs = model.to(memory_format=torch.channels_last)(images, keys)
    assert {name: tuple(x.shape[:2]) for name, x in outputs.items() if name != "features"} == {
        "out": (2, 3), "aux": (2, 3), "embedding": (2, 16),
    }  # fmt: skip
    sum(x.square().mean() for x in outputs.values()).backward()
    trained = {name for name, x in model.named_parameters() if x.grad is not None and x.grad.abs().sum() > 0}
    gamma_starts_at_zero = {"query_conv", "key_conv", "value_conv"}
    assert all(
        any(part in x for part in gamma_starts_at_zero)
        for x, _ in model.named_parameters()
        if x not in trained
    )
    assert list(model.eval()(images)) == ["out"]
    assert model.classifier_names()[0] == "head.bottleneck.3.weight"


def test_only_the_context_module_differs():
    with torch.device("meta"):
        models = {name: build_model(name, backbone="resnet18") for name in HEADS}
    shapes = {
        name: {
            entry: tuple(x.shape)
            for entry, x in model.state_dict().items()
            if not entry.startswith(("head.cca", "head.context", "head.convb.0"))
        }
        for name, model in models.items()
    }
    assert all(entries == shapes["ccnet"] for entries in shapes.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "pspnet", "recurrence": 3}, "recurrence=3 is an option of ccnet; model pspnet has none"),
        (
            {"explicit_attention": True},
            "explicit_attention=True is an option of nonlocal; model ccnet has none",
        ),
        ({"model": "fcn", "initial_gamma": 1}, "initial_gamma=1 is an option of ccnet, nonlocal; model fcn"),
    ],
)
def test_an_option_of_another_head_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**options)


def test_another_head_drops_the_options_of_the_old_one_unless_they_are_asked_for():
    config = NetworkConfig(recurrence=3, initial_gamma=1.0, num_classes=11)
    assert config.with_changes({"model": "fcn"}) == NetworkConfig(model="fcn", num_classes=11)
    assert config.with_changes({"model": "nonlocal"}) == NetworkConfig("nonlocal", 11, initial_gamma=1.0)
    assert config.with_changes({"model": "ccnet", "num_classes": 11}) == config
    with pytest.raises(ValueError, match="recurrence=1 is an option of ccnet"):
        config.with_changes({"model": "fcn", "recurrence": 1})
    with pytest.raises(ValueError, match="model must be one of"):
        config.with_changes({"model": "fcm"})


@pytest.mark.parametrize("name", ["ccnet", "nonlocal"])
def test_gamma_starts_where_it_is_told_and_nothing_else_changes(name):
    def state(gamma):
        torch.manual_seed(0)
        return build_model(name, backbone="resnet18", num_classes=3, initial_gamma=gamma).state_dict()

    usual, started = state(0.0), state(0.5)
    gamma = next(entry for entry in usual if entry.endswith(".gamma"))
    assert (usual.pop(gamma).item(), started.pop(gamma).item()) == (0, 0.5)
    assert all(torch.equal(usual[entry], started[entry]) for entry in usual)


@pytest.mark.parametrize("frames", [1, 3])
def test_clips_are_folded_and_only_the_attention_sees_time(frames, monkeypatch):
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", num_classes=3).train()
    seen = []

    def attention(x):
        seen.append(tuple(x.shape))
        return x + (x.mean(2, keepdim=True) if x.dim() == 5 else 0)  # mixes frames

    monkeypatch.setattr(model.head.cca, "forward", attention)
    clips, keys = torch.randn(2, 3, frames, 33, 41), torch.tensor([5, 6])
    outputs = model(clips, keys)
    assert {name: x.shape[0] for name, x in outputs.items()} == dict.fromkeys(
        ("out", "features", "aux"), 2 * frames
    )
    assert seen == [(2, 128, frames, 5, 6) if frames > 1 else (2, 128, 5, 6)] * 2
    # Frame by frame, clip after clip: what has no attention in it is that of the frames as a batch.
    folded = torch.cat([clips[0].transpose(0, 1), clips[1].transpose(0, 1)])
    alone = model(folded, keys.repeat_interleave(frames))
    torch.testing.assert_close(outputs["aux"], alone["aux"], rtol=1e-4, atol=1e-5)
    if frames == 1:
        assert torch.equal(outputs["out"], alone["out"])
    else:
        assert not torch.allclose(outputs["out"], alone["out"])


def test_without_rounds_the_attention_is_not_trained():
    """DistributedDataParallel waits for the gradient of every parameter that is."""
    for recurrence in (0, 2):
        head = build_model(backbone="resnet18", recurrence=recurrence).head
        assert all(x.requires_grad == (recurrence > 0) for x in head.cca.parameters())


@pytest.mark.parametrize("stem", ["deep", "plain"])
def test_feature_maps_are_rounded_up(stem):
    """The pooling's ceil_mode: 96×128 gives 13×17 features."""
    network = build_model(backbone="resnet18", stem=stem).eval()
    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 96, 128))["out"].shape[2:] == (13, 17)


def test_the_model_by_position_by_keyword_and_in_a_config():
    networks = [build_model("fcn", backbone="resnet18"), build_model(name="fcn", backbone="resnet18")]
    networks += [build_model(model="fcn", backbone="resnet18"), build_model(networks[0].config)]
    assert len({network.config for network in networks}) == 1
    assert build_model(backbone="resnet18").config.model == "ccnet"
    with pytest.raises(TypeError):
        build_model("fcn", model="gcn")
