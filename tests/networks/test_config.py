"""NetworkConfig and the registries."""

import dataclasses

import pytest
import torch
from torch import nn

from networks import BACKBONES, HEADS, NORMS, Backbone, Head, NetworkConfig, build_model
from networks.layers import conv3x3, conv_norm


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "fnc"}, "model must be one of ccnet"),
        ({"backbone": "resnet34"}, "backbone must be one of resnet18, resnet50, resnet101"),
        ({"norm": "bn"}, "norm must be one of auto, inplace_abn, sync, abn; got 'bn'"),
        ({"stem": "wide"}, "stem must be one of deep, plain, v1c; got 'wide'"),
        ({"recurrence": -1}, "recurrence must be at least 0; got -1"),
        ({"recurrence": 2.5}, "recurrence must be a whole number; got 2.5"),
        ({"num_classes": 0}, "num_classes must be at least 1 and at most 255; got 0"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be above 0; got (1.0, 0.0, 1.0)"),
        ({"channel_order": "GBR"}, "channel_order must be one of BGR, RGB; got 'GBR'"),
        ({"recurrance": 2}, "NetworkConfig has no field recurrance"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the whole line is compared)
        NetworkConfig.from_dict(settings)
    assert str(caught.value).startswith(message)


def test_every_field_has_help_and_plain_values():
    assert all(field.metadata["help"] for field in dataclasses.fields(NetworkConfig))
    config = NetworkConfig(num_classes=3, backbone="resnet18", stem="plain", mean=(1.0, 2.0, 3.0))
    assert NetworkConfig.from_dict(config.to_dict()) == config
    assert {type(x) for x in config.to_dict().values()} <= {str, int, float, tuple, bool}


def test_keywords_stand_for_the_fields_of_a_config():
    config = NetworkConfig(num_classes=3, backbone="resnet18", channel_order="RGB")
    with torch.device("meta"):
        model = build_model(config, num_classes=4, recurrence=1)
    assert (model.head.classifier.out_channels, model.head.recurrence) == (4, 1)
    assert (model.backbone.channel_order, model.backbone.mean) == ("RGB", config.mean)


class OwnHead(Head):
    def __init__(self, in_channels, num_classes, norm):
        super().__init__()
        self.reduce = conv_norm(conv3x3(in_channels, 6), norm)
        self.add_classifier(6, num_classes)

    def features(self, x):
        return self.reduce(x)


class OwnBackbone(Backbone):
    channels = (4, 8)

    def __init__(self, norm, **_):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 8, 1), nn.Conv2d(4, 8, 1)
        self.norm = norm(4)

    def forward(self, images):
        x = self.norm(self.first(images))
        return x, self.second(x)


def test_a_head_a_backbone_and_a_norm_of_ones_own(monkeypatch):
    monkeypatch.setitem(HEADS, "own", OwnHead)
    monkeypatch.setitem(BACKBONES, "tiny", OwnBackbone)
    monkeypatch.setitem(NORMS, "batch", lambda channels, **activation: nn.BatchNorm2d(channels))
    model = build_model("own", backbone="tiny", norm="batch", num_classes=3)
    outputs = model(torch.randn(2, 3, 33, 40))
    assert {name: tuple(x.shape) for name, x in outputs.items()} == {
        "out": (2, 3, 5, 5),
        "aux": (2, 3, 5, 5),
        "features": (2, 6, 5, 5),
    }
    assert model.classifier_names() == (
        "head.classifier.weight",
        "head.classifier.bias",
        "dsn.3.weight",
        "dsn.3.bias",
    )
    names = set(model.state_dict())
    assert {"first.weight", "norm.running_mean", "head.reduce.0.weight", "dsn.0.bias"} <= names
    with pytest.raises(ValueError, match="recurrence=1 is an option of ccnet; model own has none"):
        build_model("own", backbone="tiny", recurrence=1)
