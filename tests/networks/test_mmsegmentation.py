"""CCNet of mmsegmentation, written again here from its description, and our network with its weights."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluation.inference import whole
from networks import NetworkConfig, build_model, fold_norms, load_model, start_from
from networks.config import REFERENCE_NETWORK, difference
from networks.mmsegmentation import MMSEGMENTATION_NETWORK, class_names, to_mmsegmentation
from utils.checkpoint import CheckpointError, load_checkpoint

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
CLASSES = 5


class ConvModule(nn.Module):
    def __init__(self, in_channels, out_channels, size=3):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    def __init__(self, in_channels, planes, stride, dilation):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        if in_channels != 4 * planes:
            conv = nn.Conv2d(in_channels, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * planes))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNetV1c(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        channels, layers = (3, 32, 32, 64), []
        for index, (before, after) in enumerate(pairwise(channels)):
            conv = nn.Conv2d(before, after, 3, 2 if index == 0 else 1, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.stem = nn.Sequential(*layers)
        width = 64
        for stage, (count, stride, dilation) in enumerate(
            zip(blocks, (1, 2, 1, 1), (1, 1, 2, 4), strict=True)
        ):
            layers = []
            for index in range(count):
                first = index == 0
                spread = max(dilation // 2, 1) if first else dilation
                layers.append(Block(width, 64 * 2**stage, stride if first else 1, spread))
                width = 256 * 2**stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))

    def forward(self, x):
        x = self.layer2(self.layer1(F.max_pool2d(self.stem(x), 3, 2, 1)))
        x = self.layer3(x)
        return x, self.layer4(x)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.8))


class CrissCross(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.query_conv = nn.Conv2d(channels, channels // 8, 1)
        self.key_conv = nn.Conv2d(channels, channels // 8, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = Scale()

    def forward(self, x):
        """As a dense attention with a mask, another formulation than ours."""
        height, width = x.shape[2:]
        query, key, value = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        row, column = (index.flatten() for index in torch.meshgrid(
            torch.arange(height), torch.arange(width), indexing="ij"
        ))  # fmt: skip
        seen = (row[:, None] == row) | (column[:, None] == column)
        energy = torch.einsum("bcu,bci->bui", query, key).masked_fill(~seen, -torch.inf)
        return x + self.gamma.scale * torch.einsum("bui,bci->bcu", energy.softmax(-1), value).view_as(x)


class DecodeHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(2048, 512), ConvModule(512, 512))
        self.cca = CrissCross(512)
        self.conv_cat, self.conv_seg = ConvModule(2560, 512), nn.Conv2d(512, CLASSES, 1)

    def forward(self, x):
        y = self.convs[1](self.cca(self.cca(self.convs[0](x))))
        return self.conv_seg(self.conv_cat(torch.cat([x, y], dim=1)))


class AuxiliaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs, self.conv_seg = nn.Sequential(ConvModule(1024, 256)), nn.Conv2d(256, CLASSES, 1)

    def forward(self, x):
        return self.conv_seg(self.convs(x))


class Their(nn.Module):
    def __init__(self, backbone="resnet50"):
        super().__init__()
        self.backbone = ResNetV1c(BLOCKS[backbone])
        self.decode_head, self.auxiliary_head = DecodeHead(), AuxiliaryHead()

    def forward(self, pictures):
        """RGB (B,3,H,W) in 0..255 → logits at 1/8, of the auxiliary head too."""
        mean, std = (torch.tensor(x, dtype=pictures.dtype).view(3, 1, 1) for x in (MEAN, STD))
        layer3, layer4 = self.backbone((pictures - mean) / std)
        return self.decode_head(layer4), self.auxiliary_head(layer3)


def lively(model):
    """Weights of both signs, some of them smaller than eps, and statistics of some training."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.2, 0.6).mul_(torch.randn(layer.num_features).sign())
            layer.weight.data[:3] = torch.tensor([0.0, 4e-6, -4e-6])
            layer.bias.data.normal_(0, 0.3)
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture(scope="module")
def their():
    torch.manual_seed(0)
    return lively(Their())


@pytest.fixture(scope="module")
def file(their, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmseg") / "ccnet_r50-d8.pth"
    meta = {"dataset_meta": {"classes": tuple("abcde"), "palette": [[i, 2, 3] for i in range(CLASSES)]}}
    torch.save({"meta": meta, "state_dict": their.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def ours(file):
    return load_model(file)


def normalized(pictures):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (pictures - mean) / std


def close(got, expected):
    return (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@torch.no_grad()
def test_the_same_logits_at_the_same_places(their, ours):
    model, config = ours
    assert (config.backbone, config.num_classes, config.recurrence) == ("resnet50", CLASSES, 2)
    assert (config.mean, config.std, config.channel_order) == (MEAN, STD, "RGB")
    pictures = torch.rand(1, 3, 32, 40) * 255
    expected, expected_auxiliary = their(pictures)
    assert expected.shape[2:] == (4, 5)  # the reference's pooling would give 5×6
    images = normalized(pictures)
    assert close(model(images)["out"], expected)
    assert close(fold_norms(model)(images)["out"], expected)
    layer3, layer4 = model.backbone(images)
    expected3, expected4 = their.backbone(images)
    assert close(layer3, expected3)
    assert close(layer4, expected4)
    assert close(model.auxiliary_head(layer3)["out"], expected_auxiliary)
    enlarged = F.interpolate(expected, (32, 40), mode="bilinear", align_corners=False)
    assert close(whole(model)(images).rows(0, 32), enlarged)
    assert close(whole(fold_norms(model))(images).rows(0, 32), enlarged)


def test_what_cannot_differ_does_not(ours):
    """Each difference of the two networks is one that the logits show."""
    model, config = ours
    images = normalized(torch.rand(1, 3, 41, 33) * 255)
    with torch.no_grad():
        expected = model(images)["out"]
        for other in ({"contracted_dilation": False}, {"head_activation": "leaky_relu"}, {"recurrence": 1}):
            with torch.device("meta"):  # no time for first weights
                changed = build_model(config, **other).eval()
            changed.load_state_dict(model.state_dict(), assign=True)
            assert not close(changed(images)["out"], expected), other


@torch.no_grad()
def test_there_and_back(their, ours, tmp_path):
    model = copy.deepcopy(ours[0])
    # As after training here: the auxiliary head's convolution has learnt a bias.
    model.auxiliary_head.conv.bias.normal_()
    state = to_mmsegmentation(model)
    assert state.keys() == their.state_dict().keys()
    with torch.device("meta"):
        other = Their().eval()
    other.load_state_dict(state, assign=True)  # strict: shapes too
    pictures = torch.rand(1, 3, 25, 32) * 255
    out, auxiliary = other(pictures)
    images = normalized(pictures)
    assert close(out, model(images)["out"])
    assert close(auxiliary, model.auxiliary_head(model.backbone(images)[0])["out"])
    torch.save({"state_dict": state}, tmp_path / "back.pth")
    assert close(load_model(tmp_path / "back.pth")[0](images)["out"], out)


def test_differences_are_told(ours):
    config = ours[1]
    assert difference(config, MMSEGMENTATION_NETWORK | {"backbone": "resnet50"}) == ""
    assert "stem is v1c, there deep" in difference(config, REFERENCE_NETWORK)
    assert "channel_order is BGR, there RGB" in difference(NetworkConfig(), MMSEGMENTATION_NETWORK)
    assert difference(NetworkConfig(num_classes=7, recurrence=3), REFERENCE_NETWORK) == ""


def test_names_and_colours(file):
    assert class_names(torch.load(file)) == (tuple("abcde"), tuple((i, 2, 3) for i in range(CLASSES)))
    assert class_names({"meta": {"CLASSES": ["x"], "PALETTE": None}}) == (("x",), None)
    assert class_names({"meta": {}}) is None
    assert class_names({}) is None


@torch.no_grad()
def test_plain_batch_norm_under_our_names(tmp_path):
    """The reference's layout trained with BatchNorm, whose counters tell it."""
    torch.manual_seed(1)
    model = build_model(backbone="resnet18", num_classes=3).eval()
    state, images = model.state_dict(), torch.randn(1, 3, 33, 41)
    for name in [name for name in state if name.endswith(".running_mean")]:
        norm = name.removesuffix(".running_mean")
        state[f"{norm}.num_batches_tracked"] = torch.tensor(3)
        # BatchNorm's scale is its weight: here the negative of the one that ABN has.
        state[f"{norm}.weight"] = -(state[f"{norm}.weight"].abs() + 1e-5)
    expected = model(images)["out"]
    torch.save(state, tmp_path / "plain.pth")
    loaded, _ = load_model(tmp_path / "plain.pth")
    for name, layer in loaded.named_modules():
        if hasattr(layer, "running_mean"):
            assert (layer.weight >= 0).all(), name
    # The sign is in the convolutions: with positive weights they would be as before.
    assert torch.equal(loaded.head.conva[0].weight, -model.head.conva[0].weight)
    flipped = build_model(backbone="resnet18", num_classes=3).eval()
    for layer, twin in zip(model.modules(), flipped.modules(), strict=True):
        if isinstance(layer, nn.Conv2d):
            twin.weight.data.copy_(layer.weight)
    assert not close(loaded(images)["out"], expected)


def test_starting_from_it(file):
    config = NetworkConfig(**MMSEGMENTATION_NETWORK, backbone="resnet50", num_classes=CLASSES)
    model = build_model(config)
    contents = load_checkpoint(file)
    assert start_from(model, contents, file) == ""
    assert close(model.head.cca.gamma, torch.tensor([0.8]))
    # A network whose shapes alone would take these weights.
    with torch.device("meta"):
        other = build_model(config, contracted_dilation=False)
    with pytest.raises(CheckpointError, match=r"another network; --contracted-dilation True$"):
        start_from(other, contents, file)


def test_other_networks_of_theirs_are_refused(tmp_path):
    state = {"decode_head.cca.query_conv.weight": torch.zeros(1), "backbone.conv1.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "v1.pth")
    with pytest.raises(CheckpointError, match="only R-50-D8 and R-101-D8"):
        load_model(tmp_path / "v1.pth")
