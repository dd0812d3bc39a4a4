"""The network beside torchvision's own: names, weights that load, and that it starts as the plain one."""

from dataclasses import replace

import pytest
import torch

from instances.errors import UsageError
from instances.model import (
    ATTENTION_PREFIX,
    MaskRCNNConfig,
    build_model,
    load_model,
    norm_eps_of,
    start_from,
)
from utils.checkpoint import CheckpointError

try:
    import torchvision
except (ImportError, RuntimeError) as missing:
    pytest.skip(f"torchvision: {missing}", allow_module_level=True)

SMALL = {"backbone": "resnet18", "min_size": 64, "max_size": 96, "roi_samples": 8, "proposals": 16}
PLAIN = MaskRCNNConfig(num_classes=5, attention="none", recurrence=0, **SMALL)


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = build_model(PLAIN, score_threshold=0.0)
    for name, buffer in model.named_buffers():  # frozen statistics that are not 0 and 1
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def outputs(model, seed=1):
    """Detections and, from the same draws, training losses of two images."""
    torch.manual_seed(seed)
    images = [torch.rand(3, 60, 80), torch.rand(3, 90, 64)]
    target = {
        "boxes": torch.tensor([[10.0, 10, 50, 40]]),
        "labels": torch.tensor([4]),
        "masks": torch.ones(1, 60, 80, dtype=torch.uint8),
    }
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty["masks"] = torch.zeros(0, 90, 64, dtype=torch.uint8)
    with torch.no_grad():
        found = model.eval()(images)
        losses = model.train()(images, [target, empty])
    return [x for one in found for x in one.values()], list(losses.values())


@pytest.mark.parametrize(
    ("attention", "recurrence"), [("criss_cross", 1), ("criss_cross", 2), ("nonlocal", 1)]
)
def test_with_attention_it_starts_as_the_plain_network(plain, attention, recurrence, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    config = MaskRCNNConfig(num_classes=5, attention=attention, recurrence=recurrence, **SMALL)
    model = build_model(config, score_threshold=0.0)
    start_from(model, tmp_path / "plain.pth")
    new = set(model.state_dict()) - set(plain.state_dict())
    assert new
    assert all(name.startswith(ATTENTION_PREFIX) for name in new)
    expected, found = outputs(plain), outputs(model)
    assert len(expected[0][0]) > 0  # there are boxes to compare
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.nn.init.constant_(model.get_parameter(ATTENTION_PREFIX + "gamma"), 0.5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(outputs(model)[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet101"])
def test_names_and_shapes_are_torchvisions_but_for_the_attention(backbone):
    with torch.device("meta"):
        ours = build_model(MaskRCNNConfig(backbone=backbone)).state_dict()
        detection = torchvision.models.detection
        body = detection.backbone_utils.resnet_fpn_backbone(backbone_name=backbone, weights=None)
        theirs = detection.MaskRCNN(body, 91).state_dict()
    attention = {name for name in ours if name.startswith(ATTENTION_PREFIX)}
    assert len(attention) == 7
    assert {n: x.shape for n, x in ours.items() if n not in attention} == {
        n: x.shape for n, x in theirs.items()
    }


def test_the_released_files_older_names_load(plain, tmp_path):
    state = {}
    for name, value in plain.state_dict().items():
        for index in range(4):
            name = name.replace(f"mask_head.{index}.0.", f"mask_head.mask_fcn{index + 1}.")
            name = name.replace(f"inner_blocks.{index}.0.", f"inner_blocks.{index}.")
            name = name.replace(f"layer_blocks.{index}.0.", f"layer_blocks.{index}.")
        state[name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    assert len(set(state) - set(plain.state_dict())) == 26
    torch.save(state, tmp_path / "old.pth")
    model = build_model(PLAIN)
    start_from(model, tmp_path / "old.pth")
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_the_epsilon_of_the_normalisation_is_that_of_the_weights(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    torch.save({"rpn.head.conv.weight": torch.zeros(1)}, tmp_path / "released.pth")
    config = replace(PLAIN, norm_eps=0.0).to_dict()
    torch.save({"config": config, "model": plain.state_dict()}, tmp_path / "ours.pth")
    names = {"plain.pth": 1e-5, "released.pth": 0.0, "ours.pth": 0.0}
    assert {name: norm_eps_of(tmp_path / name) for name in names} == names
    assert norm_eps_of(None) == 1e-5


def test_an_imagenet_resnet_becomes_the_backbone(tmp_path):
    resnet = torchvision.models.resnet18()
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    model = build_model(MaskRCNNConfig(num_classes=5, **SMALL))
    assert start_from(model, tmp_path / "resnet.pth").startswith("the ImageNet backbone")
    for name, value in resnet.state_dict().items():
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked"):
            assert torch.equal(model.backbone.body.state_dict()[name], value), name


def test_weights_of_another_architecture_are_told_in_one_line(plain, tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "vgg.pth")
    torch.save(plain.state_dict(), tmp_path / "five.pth")
    (tmp_path / "text.pth").write_text("no weights")
    cases = [
        (PLAIN, "resnet50.pth", "weights of another architecture (size mismatch for layer1.0.conv1"),
        (PLAIN, "vgg.pth", "holds neither a ResNet in torchvision's names nor a Mask R-CNN"),
        (PLAIN, "text.pth", "not a readable checkpoint"),
        (PLAIN, "none.pth", "no such checkpoint"),
        (MaskRCNNConfig(num_classes=9, **SMALL), "five.pth", "--not-restore-last leaves these layers out"),
    ]
    for config, name, message in cases:
        with pytest.raises(CheckpointError) as caught:
            start_from(build_model(config), tmp_path / name)
        assert message in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_other_classes_start_from_the_rest(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "five.pth")
    model = build_model(MaskRCNNConfig(num_classes=9, **SMALL))
    start_from(model, tmp_path / "five.pth", new_predictors=True)
    name = "roi_heads.mask_head.0.0.weight"
    assert torch.equal(model.state_dict()[name], plain.state_dict()[name])


def test_a_plain_network_does_not_take_what_has_attention(tmp_path):
    torch.save(build_model(MaskRCNNConfig(num_classes=5, **SMALL)).state_dict(), tmp_path / "rcca.pth")
    with pytest.raises(CheckpointError, match=r"7 unexpected, such as backbone.body.layer3.attention.gamma"):
        start_from(build_model(PLAIN), tmp_path / "rcca.pth")


def test_only_checkpoints_of_the_training_are_evaluated(plain, tmp_path):
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of instances\.train"):
        load_model(tmp_path / "plain.pth")
    torch.save({"config": PLAIN.to_dict(), "model": plain.state_dict()}, tmp_path / "ours.pth")
    with pytest.raises(UsageError, match="min_size must be at least 32; got 5"):
        load_model(tmp_path / "ours.pth", min_size=5)
    broken = plain.state_dict() | {"backbone.body.conv1.weight": torch.full((64, 3, 7, 7), torch.nan)}
    torch.save({"config": PLAIN.to_dict(), "model": broken}, tmp_path / "broken.pth")
    with pytest.raises(
        CheckpointError, match=r"broken.pth: 1 of its weights are not finite, such as backbone"
    ):
        load_model(tmp_path / "broken.pth")
    model, _ = load_model(tmp_path / "ours.pth", min_size=48)
    assert not model.training
    assert model.transform.min_size == (48,)


def test_frozen_stages_and_norms_are_not_trained():
    model = build_model(MaskRCNNConfig(num_classes=5, trainable_layers=2, **SMALL))
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    body = {name.split(".")[2] for name in trained if name.startswith("backbone.body")}
    assert body == {"layer3", "layer4"}
    assert ATTENTION_PREFIX + "gamma" in trained
    assert not any(".bn" in name for name in trained)
