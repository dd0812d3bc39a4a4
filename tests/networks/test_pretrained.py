"""Weights from files: released state dicts, checkpoints old and new, ImageNet backbones."""

import lzma
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import libs
from networks import HEADS, Head, NetworkConfig, build_model, load_model, settings_from_start, start_from
from networks.layers import conv_norm
from networks.names import IMAGENET_MEAN, IMAGENET_STD, from_torchvision
from networks.resnet import STEMS
from utils.checkpoint import CheckpointError, load_checkpoint


class PlainBlock(nn.Module):
    def __init__(self, in_channels, planes, stride, dilation, expansion):
        super().__init__()
        self.wide = expansion == 4
        sizes = ((1, 1), (3, stride), (1, 1)) if self.wide else ((3, stride), (3, 1))
        channels = [in_channels, *[planes] * (len(sizes) - 1), planes * expansion]
        for index, (size, step) in enumerate(sizes):
            spread = dilation if size == 3 else 1
            conv = nn.Conv2d(
                channels[index], channels[index + 1], size, step, size // 2 * spread, spread, bias=False
            )
            setattr(self, f"conv{index + 1}", conv)
            setattr(self, f"bn{index + 1}", nn.BatchNorm2d(channels[index + 1]))
        self.downsample = None
        if stride > 1 or in_channels != channels[-1]:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels[-1], 1, stride, bias=False), nn.BatchNorm2d(channels[-1])
            )

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.wide:
            x = self.bn3(self.conv3(F.relu(x)))
        return F.relu(x + shortcut)


class PlainResNet(nn.Module):
    """torchvision's ResNet as its documentation describes it, dilated; images RGB in 0..1, normalised."""

    def __init__(self, blocks, expansion):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        in_channels = 64
        for stage, (count, stride, dilation) in enumerate(
            zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)
        ):
            planes = 64 * 2**stage
            layers = []
            for index in range(count):
                layers.append(
                    PlainBlock(in_channels, planes, stride if index == 0 else 1, dilation, expansion)
                )
                in_channels = planes * expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(in_channels, 5)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(images))), 3, 2, 1, ceil_mode=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return x, self.layer4(x)


PLAIN = {"resnet18": ((2, 2, 2, 2), 1), "resnet50": ((3, 4, 6, 3), 4)}


def start(model, path, **options):
    return start_from(model, load_checkpoint(path), path, **options)


def lively(model):
    """Weights of both signs, some of them smaller than eps or zero, and statistics of some training."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.normal_(0.3, 0.5)
            layer.weight.data[:3] = torch.tensor([0.0, 4e-6, -4e-6])
            layer.bias.data.normal_(0, 0.3)
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return model


def pixels(size=(57, 70)):
    """A smooth picture, as real ones are, (1,3,H,W) in 0..255, RGB."""
    coarse = torch.rand(1, 3, 9, 11, dtype=torch.float64) * 255
    return F.interpolate(coarse, size, mode="bicubic").clamp(0, 255).round()


def ours(rgb, config):
    image = rgb.flip(1) if config.channel_order == "BGR" else rgb
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (config.mean, config.std))
    return (image - mean) / std


def torchvisions(rgb):
    mean, std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (rgb / 255 - mean) / std


def compare(backbone, plain, rgb, config, tolerance):
    """Features of both networks on an image that goes on beyond the border, so that padding plays no part.

    What padding touches is cut off after the stem, and the rest of the network runs on that.
    """
    x, want = ours(rgb, config), torchvisions(rgb)
    stem = backbone.bn1(backbone.conv1(x))[:, :, 2:-2, 2:-2].contiguous()
    expected = plain.bn1(plain.conv1(want))[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(stem, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    actual = backbone.layer2(backbone.layer1(F.relu(backbone.maxpool(stem))))
    expected = plain.layer2(plain.layer1(F.max_pool2d(F.relu(expected), 3, 2, 1, ceil_mode=True)))
    for stage in (3, 4):
        actual, expected = (
            getattr(x, f"layer{stage}")(y) for x, y in ((backbone, actual), (plain, expected))
        )
        assert expected.abs().max() > 0
        assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        NetworkConfig(backbone="resnet18", stem="plain", num_classes=2),
        NetworkConfig(
            backbone="resnet18", stem="plain", channel_order="RGB", mean=(9.0, 8.0, 7.0), std=(2.0, 3.0, 4.0)
        ),
        NetworkConfig(backbone="resnet50", stem="plain", num_classes=2, norm="abn"),
    ],
    ids=["resnet18", "other input", "resnet50"],
)
def test_torchvision_weights_give_torchvisions_features(tmp_path, config):
    torch.manual_seed(0)
    plain = lively(PlainResNet(*PLAIN[config.backbone])).eval()
    torch.save(plain.state_dict(), tmp_path / "resnet.pth")
    model = build_model(config).eval()
    assert start(model, tmp_path / "resnet.pth") == "heads"
    with torch.no_grad():
        compare(model.backbone.double(), plain.double(), pixels(), config, 1e-5)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_training_moves_torchvisions_filters_as_there(tmp_path, order):
    """The step of SGD, relative to the filters; 57² times as long if they are made small for large pixels."""
    torch.manual_seed(0)
    plain = PlainResNet(*PLAIN["resnet18"])
    torch.save(plain.state_dict(), tmp_path / "resnet.pth")
    config = NetworkConfig(
        backbone="resnet18", stem="plain", channel_order=order, std=(1.0, 1.0, 1.0), num_classes=2
    )
    model = build_model(config)
    start(model, tmp_path / "resnet.pth")
    rgb, steps = pixels(), []
    for net, x in ((model.backbone.double(), ours(rgb, config)), (plain.double(), torchvisions(rgb))):
        stem = net.bn1(net.conv1(x))[:, :, 2:-2, 2:-2]
        (stem * torch.linspace(-1, 1, stem.numel(), dtype=torch.float64).view_as(stem)).sum().backward()
        steps.append(float(net.conv1.weight.grad.norm() / net.conv1.weight.detach().norm()))
    assert steps[0] == pytest.approx(steps[1], rel=0.3)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_real_weights_on_real_pictures(backbone, imagenet, camvid_picture):
    config = NetworkConfig(backbone=backbone, stem="plain", num_classes=2)
    path = imagenet / f"{backbone}_imagenet_fp16.pth.xz"
    model = build_model(config).eval()
    start(model, path)
    plain = PlainResNet(*PLAIN[backbone])
    plain.fc = nn.Linear(plain.fc.in_features, 1000)
    with lzma.open(path) as file:
        plain.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        compare(model.backbone.double(), plain.double().eval(), camvid_picture, config, 1e-4)


def test_a_file_for_the_other_stem_says_which_it_needs(tmp_path):
    for stem, other in (("plain", "deep"), ("deep", "plain")):
        model = build_model(backbone="resnet18", stem=stem, num_classes=2)
        state = {name: x for name, x in model.state_dict().items() if name in model.backbone_names()}
        torch.save(state, tmp_path / "backbone.pth")
        with pytest.raises(CheckpointError, match=rf"backbone.pth: is for the {stem} stem .* --stem {stem}$"):
            start(build_model(backbone="resnet18", stem=other, num_classes=2), tmp_path / "backbone.pth")


def test_our_own_checkpoint_with_the_plain_stem_is_taken_as_it_is(tmp_path):
    model = build_model(backbone="resnet18", stem="plain", num_classes=2)
    torch.save({"model": model.state_dict()}, tmp_path / "own.pth")
    other = build_model(backbone="resnet18", stem="plain", num_classes=2)
    assert start(other, tmp_path / "own.pth") == ""
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


def tiny(**settings):
    return build_model(**{"backbone": "resnet18", "num_classes": 3, **settings})


def same(model, other, names):
    return all(torch.equal(other.state_dict()[name], model.state_dict()[name]) for name in names)


def test_a_backbone_alone_predicts_nothing(tmp_path):
    names = tiny().backbone_names()
    state = {name: value for name, value in tiny().state_dict().items() if name in names}
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: is a backbone without a head; train a"):
        load_model(tmp_path / "x.pth")


def test_what_does_not_fit_because_it_is_of_another_network(tmp_path):
    state = tiny(model="pspnet").state_dict()
    message = "does not fit this network; .*; its model is pspnet, the network's ccnet: --model pspnet$"
    with pytest.raises(CheckpointError, match=message):
        start_from(tiny(), state, tmp_path / "x.pth")
    # What a file does not say is no cause.
    with pytest.raises(CheckpointError) as caught:
        start_from(tiny(), {"encoder.weight": torch.ones(2)}, tmp_path / "x.pth")
    assert "; its " not in str(caught.value)
    with pytest.raises(CheckpointError, match="does not fit this network"):
        start_from(tiny(), {"model": state, "network": 5}, tmp_path / "x.pth")  # another program's


@pytest.mark.parametrize("stem", STEMS)
def test_a_backbone_with_plain_batch_norm_computes_the_same(stem):
    """Weights of any sign; ABN scales by |weight| + eps."""
    torch.manual_seed(0)
    settings = {"backbone": "resnet18", "stem": stem, "num_classes": 5, "channel_order": "RGB"}
    settings |= {"mean": tuple(255 * x for x in IMAGENET_MEAN), "std": tuple(255 * x for x in IMAGENET_STD)}
    plain = libs.replace_by_batch_norm(build_model("fcn", norm="abn", **settings).backbone).double().eval()
    for layer in plain.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.normal_()
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    model = build_model("fcn", **settings).double().eval()
    assert start_from(model, plain.state_dict() | {"fc.bias": torch.zeros(9)}, Path("x.pth")) == "heads"
    images = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    expected = plain(images)[1]
    assert (model.backbone(images)[1] - expected).norm() < 1e-5 * expected.norm()


class PlainNormHead(Head):
    """Its second normalisation is PyTorch's own."""

    def __init__(self, in_channels, num_classes, norm):
        super().__init__()
        self.first = conv_norm(nn.Conv2d(in_channels, 8, 1, bias=False), norm)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.add_classifier(8, num_classes)

    def features(self, x):
        return self.second(self.first(x))


def test_a_network_may_have_both_abn_and_batch_norm(tmp_path, monkeypatch):
    """Counters of batches tell the one from the other in a file; here both are in place."""
    monkeypatch.setitem(HEADS, "plain_norm", PlainNormHead)
    torch.manual_seed(0)
    model = build_model("plain_norm", backbone="resnet18", num_classes=3)
    for norm in (model.head.first[1], model.head.second[1]):
        norm.weight.data.normal_()  # of both signs
    model.train()(torch.randn(2, 3, 33, 33))
    model.eval()
    torch.save({"model": model.state_dict(), "network": model.config.to_dict()}, tmp_path / "x.pth")
    loaded, _ = load_model(tmp_path / "x.pth")
    assert same(model, loaded, model.state_dict())
    assert loaded.head.second[1].num_batches_tracked == 1
    other = build_model("plain_norm", backbone="resnet18", num_classes=3)
    assert start(other, tmp_path / "x.pth") == ""
    assert same(model, other, model.state_dict())


def test_evaluation_needs_neither_auxiliary_head_nor_embedding(tmp_path):
    model = tiny(embedding_channels=16)
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("dsn.")}
    torch.save(state, tmp_path / "x.pth")
    loaded, _ = load_model(tmp_path / "x.pth")
    assert same(model, loaded, [name for name in state if not name.startswith("embedding.")])
    state["dsn.0.bias"] = model.auxiliary_head.conv.bias.data  # half a head is a damaged file
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"missing: dsn\.0\.weight"):
        load_model(tmp_path / "x.pth")


def test_what_the_weights_of_a_checkpoint_mean_is_taken_over(tmp_path):
    other = {
        "mean": (1.0, 2.0, 3.0), "std": (4.0, 5.0, 6.0), "channel_order": "RGB", "head_activation": "relu",
        "contracted_dilation": True, "align_corners": False,
    }  # fmt: skip
    path, state = tmp_path / "x.pth", {"x": torch.zeros(1)}
    config = NetworkConfig(backbone="resnet18", recurrence=1, **other)
    assert settings_from_start({"model": state, "network": config.to_dict()}, path) == other
    assert settings_from_start(
        {"model": state, "network": {"backbone": "resnet18", "std": [1, 2, 3]}}, path
    ) == {"std": (1, 2, 3)}
    for contents in (state, {"model": state, "settings": {"backbone": "resnet18"}}, {"network": state}):
        assert settings_from_start(contents, path) == {}
    with pytest.raises(CheckpointError, match=r"x\.pth: its settings make no network \(std must be above 0"):
        settings_from_start({"model": state, "network": {"std": (0, 1, 1)}}, path)


@pytest.mark.parametrize("has_embedding", [False, True])
def test_a_run_with_or_without_embedding_starts_from_either(tmp_path, has_embedding):
    for source_has in (False, True):
        source = tiny(embedding_channels=16 * source_has)
        torch.save(source.state_dict(), tmp_path / "x.pth")
        model = tiny(embedding_channels=16 * has_embedding)
        assert start(model, tmp_path / "x.pth") == ""
        names = set(source.state_dict()) & set(model.state_dict())
        assert same(source, model, names)
        assert ("embedding.weight" in names) == (source_has and has_embedding)


def test_classifiers_for_other_classes(tmp_path):
    source, model = tiny(num_classes=5), tiny()
    torch.save(source.state_dict(), tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"\(5, 128, 1, 1\) instead .*--not-restore-last leaves the class"
    ):
        start(model, tmp_path / "x.pth")
    before = model.head.classifier.weight.clone()
    assert start(model, tmp_path / "x.pth", new_classifiers=True) == "classifiers"
    assert torch.equal(model.head.classifier.weight, before)
    assert same(source, model, set(model.state_dict()) - set(model.classifier_names()))


def test_a_backbone_file_brings_no_heads(tmp_path):
    source, model = tiny(), tiny()
    backbone = {name: source.state_dict()[name] for name in source.backbone_names()}
    torch.save(backbone | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    before = model.head.conva[0].weight.clone()
    assert start(model, tmp_path / "x.pth") == "heads"
    assert same(source, model, backbone)
    assert torch.equal(model.head.conva[0].weight, before)


def test_the_variance_of_the_first_convolution_may_be_below_eps():
    backbone = build_model(backbone="resnet18", stem="plain").backbone
    state = {f"bn1.{name}": torch.full((64,), 1e-6) for name in ("running_mean", "running_var")}
    state["conv1.weight"] = torch.randn(64, 3, 7, 7)
    ours = from_torchvision(state, backbone)
    # RGB there, BGR here; the weights are of pixels in units of 0..255, and multiplied by a common size.
    size = (ours["conv1.weight"][:, 0] / state["conv1.weight"][:, 2]).mean() * 255 * IMAGENET_STD[2]
    expected = size**2 * (state["bn1.running_var"] + 1e-5)
    torch.testing.assert_close(ours["bn1.running_var"] + 1e-5, expected, rtol=1e-3, atol=0)
