"""export.py as users run it; what it wrote is loaded without our code and held against predictions."""

import hashlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import export
from dataset import DATASETS, Normalization, generic_table
from evaluation.bands import class_ids
from evaluation.inference import whole
from networks import NetworkConfig, build_model, load_model
from networks.heads.psp import PyramidPooling
from networks.mmsegmentation import MMSEGMENTATION_NETWORK, to_mmsegmentation
from networks.portable import BinMeans, Logits, with_formula
from utils.checkpoint import load_checkpoint

CLASSES = 5


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain state dict whose network predicts a bit of everything and uses its attention."""
    torch.manual_seed(0)
    model = build_model(backbone="resnet18", num_classes=CLASSES)
    model.head.cca.gamma.data.fill_(0.9)
    model.head.classifier.weight.data.normal_()
    path = tmp_path_factory.mktemp("plain") / "plain.pth"
    torch.save(model.state_dict(), path)
    return path


def expected_ids(path, pictures):
    model, config = load_model(path)
    normalization = Normalization(config.mean, config.std, config.channel_order)
    images = torch.from_numpy(np.stack([normalization(picture) for picture in pictures]))
    with torch.inference_mode():
        return class_ids(whole(model)(images))


def some_pictures(batch, height, width):
    return np.random.default_rng(3).integers(0, 256, (batch, height, width, 3), np.uint8)


def check_described(described, full):
    assert json.loads(described["class_names"]) == [f"class {i}" for i in range(CLASSES)]
    assert len(json.loads(described["colours"])) == CLASSES
    assert json.loads(described["mean"])[0] == pytest.approx(104.00698793)
    assert (described["channel_order"], described["recurrence"]) == ("BGR", "2")
    assert len(described["checkpoint_sha256"]) == 64
    assert ("uint8" in described["input"]) == full


def test_torch_export_full(call, plain, tmp_path):
    file = tmp_path / "new" / "model.pt2"
    result = call(
        "export.py", "--restore-from", plain, "--num-classes", CLASSES, "--output", file, "--full"
    )  # fmt: skip
    assert result.status == 0, result.error
    assert result.out.count("classes agree on ") == 2
    assert [path.name for path in file.parent.iterdir()] == ["model.pt2"]
    texts = {"metadata.json": ""}
    program = torch.export.load(file, extra_files=texts)
    check_described(json.loads(texts["metadata.json"]), full=True)
    assert "cc_attention" not in program.graph_module.code  # PyTorch alone runs it
    for batch, height, width in ((1, 43, 70), (3, 64, 49)):  # neither traced nor checked
        pictures = some_pictures(batch, height, width)
        got = program.module()(torch.from_numpy(pictures))
        assert got.dtype == torch.uint8
        assert (got == expected_ids(plain, pictures)).double().mean() > 0.999


def test_onnx_logits(call, plain, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra export)")
    import onnx
    import onnxruntime

    file = tmp_path / "model.onnx"
    result = call("export.py", "--restore-from", plain, "--num-classes", CLASSES, "--output", file)
    assert result.status == 0, result.error
    assert result.out.count("largest difference") == 2
    model = onnx.load(file)
    assert model.ir_version <= 10
    assert [(x.domain, x.version) for x in model.opset_import if x.domain == ""] == [("", export.OPSET)]
    session = onnxruntime.InferenceSession(file)
    check_described(session.get_modelmeta().custom_metadata_map, full=False)
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    network = load_model(plain)[0]
    for batch, height, width in ((1, 43, 70), (3, 64, 49)):
        images = torch.from_numpy(np.stack([Normalization()(x) for x in some_pictures(batch, height, width)]))
        (got,) = session.run(None, {"images": images.numpy()})
        with torch.inference_mode():
            expected = network(images)["out"]
        torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (4, 9), (6, 12), (17, 13)])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_means_of_bins_are_adaptive_pooling(size, bins):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(BinMeans(bins)(x), F.adaptive_avg_pool2d(x, bins), rtol=0, atol=1e-7)


class Pyramid(nn.Module):
    """Nothing but pyramid pooling."""

    def __init__(self):
        super().__init__()
        self.pooling = PyramidPooling(4, nn.BatchNorm2d)

    def forward(self, images):
        return {"out": self.pooling(images[:, [0, 1, 2, 0], ::2, ::2])}


@pytest.fixture
def pyramid():
    torch.manual_seed(0)
    return Logits(Pyramid()).eval()


def test_pyramid_pooling_is_replaced(pyramid):
    replaced, images = with_formula(pyramid), torch.randn(1, 3, 49, 70)
    assert sum(isinstance(layer, BinMeans) for layer in replaced.modules()) == 4
    with torch.inference_mode():
        torch.testing.assert_close(replaced(images), pyramid(images), rtol=1e-4, atol=1e-5)


def test_pyramid_pooling_in_onnx_takes_any_size(pyramid, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra export)")
    run = export.write_onnx(with_formula(pyramid), {}, tmp_path / "x.onnx")
    for batch, height, width in ((1, 43, 70), (3, 64, 49)):
        images = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(run(images), pyramid(images), rtol=1e-4, atol=1e-4)


def test_what_onnxruntime_cannot_run():
    with (
        pytest.raises(
            export.ExportError, match=r"cannot run the exported file \(bad index\); it was not kept"
        ),
        export.onnxruntime_errors(),
    ):
        raise ArithmeticError("bad\n  index")


def test_damaged_names(call, trained, tmp_path):
    contents = torch.load(trained)
    contents["data"]["palette"] = contents["data"]["palette"][:3]
    torch.save(contents, tmp_path / "x.pth")
    result = call("export.py", "--restore-from", tmp_path / "x.pth", "--output", tmp_path / "x.pt2")
    assert result.status == 1
    assert "its table of classes is damaged" in result.error


def test_what_cannot_be_traced(plain, tmp_path):
    class Branching(Logits):
        def forward(self, images):
            return images if images.sum() > 0 else -images

    with pytest.raises(export.ExportError, match="cannot be exported"):
        export.write_pt2(Branching(load_model(plain)[0]), {}, tmp_path / "x.pt2")


def test_names_of_the_checkpoint(trained):
    """A checkpoint of train.py has its classes' names and stored ids."""
    contents, (_, config) = load_checkpoint(trained), load_model(trained)
    options = export.ExportOptions(restore_from=trained, output=trained.with_suffix(".pt2"))
    labels = export.classes_of(contents, config, trained, options)
    described = export.metadata(config, labels, trained, full=False, fit=180)
    assert json.loads(described["class_names"])[:2] == ["road", "sidewalk"]
    assert json.loads(described["label_ids"])[:2] == [7, 8]
    assert described["checkpoint_sha256"] == hashlib.sha256(trained.read_bytes()).hexdigest()


def test_names_of_a_checkpoint_from_before_it_held_them(plain):
    config = NetworkConfig(num_classes=11, backbone="resnet18")
    options = export.ExportOptions(restore_from=plain, output=plain.with_suffix(".pt2"))
    labels = export.classes_of({"settings": {"dataset": "camvid"}}, config, plain, options)
    assert labels == DATASETS["camvid"].labels


def test_weights_for_the_reference(plain, tmp_path):
    """The published network's names; a smaller one stands for it here."""
    model, config = load_model(plain)
    file = tmp_path / "reference.pth"
    export.write_weights("reference", model, NetworkConfig(num_classes=CLASSES), generic_table(CLASSES), file)
    state, own = torch.load(file), model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[name], own[name]) for name in own)
    with pytest.raises(export.ExportError, match="backbone is resnet18, there resnet101"):
        export.write_weights("reference", model, config, generic_table(CLASSES), file)


def test_weights_for_mmsegmentation(call, tmp_path):
    torch.manual_seed(0)
    config = NetworkConfig(**MMSEGMENTATION_NETWORK, backbone="resnet50", num_classes=CLASSES, recurrence=1)
    model = build_model(config)
    model.head.cca.gamma.data.fill_(2)
    model.head.classifier.weight.data.normal_()
    torch.save({"model": model.state_dict(), "network": config.to_dict()}, tmp_path / "ours.pth")
    output = ("--output", tmp_path / "theirs.pth")
    common = ("export.py", "--restore-from", tmp_path / "ours.pth", "--num-classes", CLASSES)
    result = call(*common, *output, "--names", "mmsegmentation")
    assert result.status == 0, result.error
    assert "R = 1 is not in these weights: whoever loads them has to set it\n" in result.out
    contents = load_checkpoint(tmp_path / "theirs.pth")
    assert contents["state_dict"]["decode_head.cca.gamma.scale"].shape == ()
    assert contents["meta"]["dataset_meta"]["classes"][0] == "class 0"
    result = call(*common, *output, "--names", "reference")
    assert result.status == 1
    assert "stem is v1c, there deep" in result.error


def test_training_from_mmsegmentation_takes_its_network(call, demo_data, tmp_path):
    torch.manual_seed(0)
    model = build_model(NetworkConfig(**MMSEGMENTATION_NETWORK, backbone="resnet50"))
    torch.save({"state_dict": to_mmsegmentation(model)}, tmp_path / "theirs.pth")
    small = ("--input-size", "33,41", "--batch-size", 2, "--num-steps", 1, "--learning-rate", 1e-9)
    common = ("train.py", "--data-dir", demo_data, "--restore-from", tmp_path / "theirs.pth", "--gpu", "cpu")
    options = ("--num-workers", 0, "--snapshot-dir", tmp_path / "run")
    result = call(*common, *small, *options)
    assert result.status == 0, result.error
    assert "theirs.pth, whose network is taken over\n" in result.out
    trained, config = load_model(tmp_path / "run" / "CS_scenes_1.pth")
    assert config.backbone == "resnet50"
    assert all(getattr(config, name) == value for name, value in MMSEGMENTATION_NETWORK.items())
    started = load_model(tmp_path / "theirs.pth")[0]
    for got, want in zip(trained.parameters(), started.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    result = call(*common, *small, *options, "--channel-order", "BGR")
    assert result.status == 1
    assert "is mmsegmentation's CCNet, another network; --channel-order RGB" in result.error


def test_a_file_that_computes_something_else_is_not_kept(plain, tmp_path, monkeypatch, capsys):
    def write(module, described, path):
        path.write_bytes(b"something")
        return lambda images: module(images).flip(1)

    monkeypatch.setattr(export, "write_pt2", write)
    file = tmp_path / "model.pt2"
    argv = ["export.py", "--restore-from", plain, "--num-classes", CLASSES, "--output", file]
    monkeypatch.setattr(sys, "argv", [str(x) for x in argv])
    with pytest.raises(export.ExportError, match=r"predicts other classes .* not kept"):
        export.main()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("--output", "x.tflite"), 2, "the ending must be .onnx, .pt2, or .pth"),
        (("--output", "x.pth"), 2, "needs --names"),
        (("--output", "x.onnx", "--names", "reference"), 2, "must end with .pth"),
        (("--output", "x.pth", "--names", "reference", "--full"), 2, "--full is for .onnx and .pt2"),
        (("--output", "x.pt2", "--num-classes", "5", "--dataset", "camvid"), 2, "exclude each other"),
        (("--output", "x.pt2"), 1, "holds no class names"),
        (("--output", "x.pt2", "--dataset", "cityscapes"), 1, "has 5 classes, not 19"),
        (("--output", "plain.pth", "--names", "reference", "--num-classes", "5"), 2, "checkpoint itself"),
        (("--output", "plain.pth/x.pt2", "--num-classes", "5"), 1, "cannot write there"),
    ],
)
def test_bad_input(call, plain, monkeypatch, arguments, status, message):
    monkeypatch.chdir(plain.parent)
    result = call("export.py", "--restore-from", plain, *arguments)
    assert result.status == status
    assert message in result.error
    assert len(result.error.splitlines()) == 1
    assert [path.name for path in plain.parent.iterdir()] == ["plain.pth"]


def test_clips_are_refused(call, trained, tmp_path):
    contents = torch.load(trained)
    contents["recipe"]["clip"] = 5
    torch.save(contents, tmp_path / "clips.pth")
    result = call("export.py", "--restore-from", tmp_path / "clips.pth", "--output", tmp_path / "x.pt2")
    assert result.status == 1
    assert "clips of 5 frames" in result.error


def test_onnx_missing(call, plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # import raises ImportError
    result = call("export.py", "--restore-from", plain, "--output", tmp_path / "x.onnx")
    assert result.status == 1
    assert "pip install onnx onnxscript onnxruntime" in result.error


def test_the_size_that_pictures_are_scaled_to_is_told(trained, tmp_path, monkeypatch, capsys):
    contents, written = load_checkpoint(trained), []
    contents["recipe"]["eval_short_side"] = 48
    torch.save(contents, tmp_path / "x_1.pth")

    def write(module, described, path):  # exporting takes half a minute
        written.append(described)
        return module

    monkeypatch.setattr(export, "write_pt2", write)
    output = str(tmp_path / "model.pt2")
    monkeypatch.setattr(
        sys, "argv", ["export.py", "--restore-from", str(tmp_path / "x_1.pth"), "--output", output]
    )
    export.main()
    scaled = "a short side of 48 (the long one at most 1000)"
    assert (
        f"note: predict.py scales pictures to {scaled} first, this file does not" in capsys.readouterr().out
    )
    assert json.loads(written[0]["fit"]) == 48
