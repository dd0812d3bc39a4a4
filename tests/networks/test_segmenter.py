"""The network against the reference's numbers: names, shapes, sizes, and what every part computes."""

import pytest
import torch
from torch.nn import functional as F

from libs import ABN
from networks import BACKBONES, HEADS, Head, build_model


@pytest.fixture(scope="module")
def published():
    with torch.device("meta"):
        return build_model()


def expected_entries():
    """The 562 names and shapes of the reference's ResNet-101 state dict, written from its structure."""
    entries = {}

    def conv(name, out_channels, in_channels, size, bias=False):
        entries[f"{name}.weight"] = (out_channels, in_channels, size, size)
        if bias:
            entries[f"{name}.bias"] = (out_channels,)

    def norm(name, channels):
        for field in ("weight", "bias", "running_mean", "running_var"):
            entries[f"{name}.{field}"] = (channels,)

    for index, (in_channels, out_channels) in enumerate(((3, 64), (64, 64), (64, 128)), start=1):
        conv(f"conv{index}", out_channels, in_channels, 3)
        norm(f"bn{index}", out_channels)
    in_channels = 128
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 23), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for index, (i, o, size) in enumerate(
                ((in_channels, planes, 1), (planes, planes, 3), (planes, 4 * planes, 1)), start=1
            ):
                conv(f"{name}.conv{index}", o, i, size)
                norm(f"{name}.bn{index}", o)
            if block == 0:
                conv(f"{name}.downsample.0", 4 * planes, in_channels, 1)
                norm(f"{name}.downsample.1", 4 * planes)
            in_channels = 4 * planes
    conv("head.conva.0", 512, 2048, 3)
    norm("head.conva.1", 512)
    conv("head.cca.query_conv", 64, 512, 1, bias=True)
    conv("head.cca.key_conv", 64, 512, 1, bias=True)
    conv("head.cca.value_conv", 512, 512, 1, bias=True)
    entries["head.cca.gamma"] = (1,)
    conv("head.convb.0", 512, 512, 3)
    norm("head.convb.1", 512)
    conv("head.bottleneck.0", 512, 2560, 3)
    norm("head.bottleneck.1", 512)
    conv("head.bottleneck.3", 19, 512, 1, bias=True)
    conv("dsn.0", 512, 1024, 3, bias=True)
    norm("dsn.1", 512)
    conv("dsn.3", 19, 512, 1, bias=True)
    return entries


def test_state_dict_has_the_references_562_names_and_shapes(published):
    entries = {name: tuple(x.shape) for name, x in published.state_dict().items()}
    assert len(entries) == 562
    assert entries == expected_entries()


def test_parameter_counts(published):
    def parameters(module):
        return sum(x.numel() for x in module.parameters())

    assert parameters(published) == 71_287_911
    assert parameters(published.head.cca) == 328_321
    assert parameters(published.head) == pytest.approx(23.93e6, abs=5e3)
    assert parameters(published.auxiliary_head) == pytest.approx(4.73e6, abs=5e3)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("size", "features"), [((769, 769), (97, 97)), ((360, 480), (46, 61)), ((66, 35), (9, 5))]
)
def test_output_is_at_one_eighth(backbone, size, features):
    with torch.device("meta"):
        model = build_model(num_classes=7, backbone=backbone)
        outputs = model(torch.empty(2, 3, *size))
        assert {name: tuple(x.shape) for name, x in outputs.items()} == {
            "out": (2, 7, *features),
            "aux": (2, 7, *features),
            "features": (2, model.backbone.channels[1] // 4, *features),
        }
        assert list(model.eval()(torch.empty(1, 3, *size))) == ["out"]


def test_strides_and_dilations(published):
    assert [
        published.backbone.conv1.stride,
        published.backbone.conv2.stride,
        published.backbone.conv3.stride,
    ] == [
        (2, 2),
        (1, 1),
        (1, 1),
    ]
    assert published.backbone.maxpool.ceil_mode
    for stage, stride, dilation in ((1, 1, 1), (2, 2, 1), (3, 1, 2), (4, 1, 4)):
        blocks = getattr(published.backbone, f"layer{stage}")
        for index, block in enumerate(blocks):
            assert block.conv2.dilation == (dilation, dilation)
            assert block.conv2.stride == ((stride, stride) if index == 0 else (1, 1))
            assert block.conv1.stride == (1, 1)  # the stride sits on the 3×3 convolution


def test_backbone_norm_has_no_activation_and_the_heads_have_leaky_relu(published):
    layers = {name: module for name, module in published.named_modules() if isinstance(module, ABN)}
    assert len(layers) == 3 + 33 * 3 + 4 + 4
    for name, layer in layers.items():
        in_head = not name.startswith("backbone.")
        assert layer.activation == ("leaky_relu" if in_head else "identity")
        assert (layer.eps, layer.momentum, layer.activation_param) == (1e-5, 0.1, 0.01)


@pytest.mark.parametrize("recurrence", [0, 1, 3])
def test_head_is_the_formula(recurrence):
    head = build_model(num_classes=4, backbone="resnet18", recurrence=recurrence).eval().head
    head.cca.gamma.data.fill_(0.3)
    x = torch.randn(1, 512, 5, 6)
    context = head.conva(x)
    for _ in range(recurrence):
        context = head.cca(context)
    joined = torch.cat([x, head.convb(context)], dim=1)
    outputs = head(x)
    torch.testing.assert_close(outputs["out"], head.classifier(head.bottleneck(joined)))
    torch.testing.assert_close(outputs["features"], context)


def test_block_is_the_formula():
    model = build_model(backbone="resnet50").eval().backbone
    for block, channels in ((model.layer2[0], 256), (model.layer2[1], 512)):
        x = torch.randn(1, channels, 7, 6)
        out = F.relu(block.bn1(block.conv1(x)))
        out = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(out)))))
        shortcut = x if block.downsample is None else block.downsample(x)
        torch.testing.assert_close(block(x), F.relu(out + shortcut))


@pytest.mark.parametrize("name", ["backbone", "head", "auxiliary_head", "dsn", "embedding"])
def test_modules_of_a_backbone_have_names_of_their_own(name, monkeypatch):
    """Its entries have no prefix in the state dict, so such a module's would be taken for the network's."""

    def make(*arguments, **options):
        backbone = BACKBONES["resnet18"](*arguments, **options)
        backbone.add_module(name, torch.nn.Conv2d(3, 3, 1))
        return backbone

    monkeypatch.setitem(BACKBONES, "own", make)
    with pytest.raises(ValueError, match=f"a backbone has no modules called {name}"):
        build_model(backbone="own")


def test_features_of_a_head_are_maps(monkeypatch):
    class Flat(Head):
        def __init__(self, in_channels, num_classes, norm):
            super().__init__()
            self.add_classifier(in_channels, num_classes)

        def features(self, x):
            return x.mean((2, 3))

    monkeypatch.setitem(HEADS, "flat", Flat)
    with pytest.raises(ValueError, match=r"Flat: features must be \(B,C,h,w\), got \(2, 512\)"):
        build_model("flat", backbone="resnet18")(torch.randn(2, 3, 33, 33))


def test_one_image_at_a_time_or_together_is_the_same_in_evaluation():
    model = build_model(num_classes=4, backbone="resnet18").eval()
    model.head.cca.gamma.data.fill_(0.5)
    images = torch.randn(2, 3, 40, 48).to(memory_format=torch.channels_last)
    with torch.no_grad():
        together = model(images)["out"]
        torch.testing.assert_close(together[1:], model(images[1:])["out"], rtol=1e-4, atol=1e-5)
