"""The predictor against the test protocol written out, which holds all logits at full size."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dataset import DATASETS, LabelTable, generic_table
from evaluation import Predictor, bands
from evaluation.checkpoint import CITYSCAPES, TrainedOn, labels_of, trained_on
from evaluation.inference import PredictionError
from evaluation.predictor import available_memory
from networks import build_model
from tests.evaluation import written_out
from utils.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
TABLE = LabelTable(("left", "right", "rest", "more"), (3, 5, 7, 9), ((1, 2, 3),) * 4, mirror_pairs=((0, 1),))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = build_model(num_classes=4, backbone="resnet18").eval()
    network.head.cca.gamma.data.fill_(0.5)
    network.head.classifier.weight.data.normal_()
    return network


def picture(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def shapes_seen_by(predictor):
    """The shapes of the network's inputs; the list grows with each."""
    shapes = []
    predictor.network.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def assert_same_classes(ids, logits):
    """Classes agree wherever the two largest logits are not equal up to rounding."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    clear = (first - second > 1e-3)[0].numpy()
    assert clear.mean() > 0.97
    assert (ids == logits.argmax(1)[0].numpy())[clear].all()
    assert len(np.unique(ids)) > 1


@pytest.mark.parametrize("size", [(57, 90), (41, 33), (20, 97)])
@pytest.mark.parametrize("how", [True, False], ids=["whole", "sliding"])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.7, 1.3), True)])
@pytest.mark.parametrize("aligned", [True, False])
def test_classes_are_those_of_the_test_protocol(model, monkeypatch, size, how, scales, flip, aligned):
    monkeypatch.setattr(model, "align_corners", aligned)
    monkeypatch.setattr(bands, "BAND_BYTES", 4 * 4 * size[1] * 7)  # bands of 7 rows
    predictor = Predictor(
        model, "cpu", amp="off", labels=TABLE, whole=how, tile_size=(33, 41), scales=scales, flip=flip
    )
    image = picture(*size)
    ids = predictor(image)
    assert ids.shape == size
    assert ids.dtype == np.uint8

    def predict(view):
        network = predictor.network
        return (
            written_out.at_full_size(network, view) if how else written_out.in_tiles(network, view, (33, 41))
        )

    with torch.inference_mode():
        inputs = torch.from_numpy(predictor.normalization(image))[None]
        logits = written_out.averaged(predict, inputs, scales, flip, TABLE.mirror_pairs)
    assert_same_classes(ids, logits)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (9, 1), (3, 2)])
@pytest.mark.parametrize("how", [True, False, None])
def test_the_smallest_pictures(model, size, how):
    ids = Predictor(model, "cpu", whole=how, tile_size=(25, 25))(picture(*size))
    assert ids.shape == size


@pytest.mark.parametrize("how", [True, False])
def test_batches_equal_single_pictures(model, how):
    predictor = Predictor(model, "cpu", amp="off", whole=how, tile_size=(25, 33), batch_size=2)
    images = [picture(30, 40, seed=seed) for seed in range(3)]
    for image, ids in zip(images, predictor.predict_batch(images), strict=True):
        assert (predictor(image) == ids).mean() > 0.99


def test_a_batch_has_one_size(model):
    with pytest.raises(ValueError, match="one shape"):
        Predictor(model, "cpu").predict_batch([picture(9, 9), picture(9, 8)])
    assert Predictor(model, "cpu").predict_batch([]) == []


@pytest.mark.parametrize("how", [True, False])
def test_clips(model, how):
    predictor = Predictor(model, "cpu", amp="off", whole=how, tile_size=(25, 25), batch_size=3)
    clip = np.stack([picture(25, 25, seed=seed) for seed in range(3)])
    ids = predictor(clip)
    assert ids.shape == (3, 25, 25)
    inputs = torch.stack([torch.from_numpy(predictor.normalization(frame)) for frame in clip], dim=1)
    for frame in range(3):
        with torch.inference_mode():
            logits = predictor.network(inputs[None])["out"][frame : frame + 1]
            assert_same_classes(ids[frame], written_out.resized(logits, (25, 25)))
    shapes = shapes_seen_by(predictor)
    predictor(np.stack([picture(25, 60)] * 3))
    assert [shape[0] for shape in shapes] == (
        [1] if how else [1] * 4
    )  # of its tiles one at a time: a batch is of three pictures


@pytest.mark.parametrize("how", [True, False])
def test_the_precision(model, how):
    seen = []
    for amp in ("bf16", "off"):
        predictor = Predictor(model, "cpu", amp=amp, whole=how, tile_size=(25, 25))
        predictor.network.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        predictor(picture(25, 25))
    assert seen == [True, False]


def test_all_frames_of_a_clip_count(model, monkeypatch):
    predictor, asked = Predictor(model, "cpu", batch_size=4), []
    monkeypatch.setattr(predictor, "goes_whole", lambda pixels: asked.append(pixels) or True)
    monkeypatch.setattr("evaluation.predictor.available_memory", lambda device: 2 * 800 * 3 * 24 * 32 * 2)
    shapes = shapes_seen_by(predictor)
    predictor.predict_batch([np.stack([picture(24, 32)] * 3)] * 3)
    assert set(asked) == {3 * 24 * 32}
    assert [shape[0] for shape in shapes] == [2, 1]  # as many as half of the memory allows


def test_a_network_of_pictures_takes_no_clips(model, tmp_path):
    """Their frames would attend to each other."""
    torch.save({"model": model.state_dict(), "network": model.config.to_dict()}, tmp_path / "x.pth")
    predictor = Predictor(tmp_path / "x.pth", "cpu", num_classes=4)
    with pytest.raises(ValueError, match=r"trained on single pictures.*predict_batch takes several"):
        predictor(np.zeros((2, 9, 9, 3), np.uint8))
    assert len(predictor.predict_batch(np.zeros((2, 9, 9, 3), np.uint8))) == 2


def test_size_and_memory_decide_how(model, monkeypatch):
    predictor = Predictor(model, "cpu")
    memory = 10**12
    monkeypatch.setattr("evaluation.predictor.available_memory", lambda device: memory)
    assert predictor.goes_whole(1024 * 2048)
    assert not predictor.goes_whole(4000 * 6000)
    memory = 1.5 * 800 * 1000
    assert not predictor.goes_whole(1000)
    memory = 10**9
    assert predictor.goes_whole(1024 * 2048)  # as decided for the picture before
    predictor = Predictor(model, "cpu")
    assert not predictor.goes_whole(1024 * 2048)
    assert predictor.goes_whole(512 * 512)
    assert Predictor(model, "cpu", whole=True).goes_whole(4000 * 6000)


def test_memory_at_hand():
    assert 2**20 < available_memory(torch.device("cpu")) < 2**50


def test_no_band_is_larger_than_stated(monkeypatch):
    monkeypatch.setattr(bands, "BAND_BYTES", 4 * 3 * 100 * 5)
    asked = []

    class Source(bands.Stored):
        def rows(self, top, bottom):
            asked.append(bottom - top)
            return super().rows(top, bottom)

    for batch, rows in ((1, 5), (2, 2)):
        logits = torch.randn(batch, 3, 33, 100)
        asked.clear()
        assert torch.equal(bands.class_ids(Source(logits)), logits.argmax(1).to(torch.uint8))
        assert max(asked) == rows


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("size", [(70, 90), (9, 7), (1, 90), (70, 11), (12, 1)])
def test_bands_are_those_of_the_whole(size, aligned):
    logits = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    whole_map = F.interpolate(logits, size, mode="bilinear", align_corners=aligned)
    resized = bands.Resized(bands.Stored(logits), size, aligned)
    for top in range(0, size[0], 4):
        bottom = min(top + 4, size[0])
        torch.testing.assert_close(resized.rows(top, bottom), whole_map[:, :, top:bottom])


def test_names_and_colours(model):
    predictor = Predictor(model, "cpu", labels=TABLE)
    assert predictor.names == TABLE.names
    assert predictor.colour(np.zeros((1, 1), np.uint8)).tolist() == [[[1, 2, 3]]]
    assert Predictor(model, "cpu").names[3] == "class 3"


def data_of(table):
    return {"names": table.names, "ids": table.ids, "palette": table.palette, "mirror_pairs": ((0, 1),)}


def test_names_in_checkpoints():
    path = Path("x.pth")
    assert labels_of({"data": data_of(TABLE)}, path, 4) == TABLE
    for name in ("camvid", "cityscapes"):
        table = DATASETS[name].labels
        assert labels_of({"settings": {"dataset": name}}, path, table.num_classes) == table
    assert labels_of({}, path, 19) == CITYSCAPES
    assert labels_of({}, path, 19, num_classes=19).names[0] == "class 0"
    assert labels_of({}, path, 5, num_classes=5).names[4] == "class 4"
    assert labels_of({"settings": {"dataset": "list"}}, path, 2).names == ("class 0", "class 1")


@pytest.mark.parametrize("classes", [7, 19])
def test_names_in_files_of_mmsegmentation(classes):
    names, palette = [f"thing {i}" for i in range(classes)], [[i, 2, 3] for i in range(classes)]
    described = {"meta": {"dataset_meta": {"classes": names, "palette": palette}}}
    table = labels_of(described, Path("x.pth"), classes)
    assert table.names == tuple(names)
    assert table.palette == tuple(map(tuple, palette))
    assert table.ids == tuple(range(classes))
    del described["meta"]["dataset_meta"]["palette"]
    table = labels_of(described, Path("x.pth"), classes)
    assert (table.names, table.palette) == (tuple(names), generic_table(classes).palette)


@pytest.mark.parametrize(
    ("contents", "classes", "given", "message"),
    [
        ({}, 5, None, "holds no class names; --num-classes 5"),
        ({}, 5, 6, "has 5 classes, not the 6"),
        ({"data": data_of(TABLE)}, 5, None, "names 4 classes, but its network has 5"),
        ({"data": {"names": ("a",), "palette": ((1, 2),)}}, 1, None, "table of classes is damaged"),
        ({"data": {"names": ("a", "b"), "palette": ((1, 2, 3),)}}, 2, None, "table of classes is damaged"),
        ({"data": {"names": None, "palette": ()}}, 2, None, "table of classes is damaged"),
        ({"meta": {"CLASSES": ["a", "b"], "PALETTE": [1, 2]}}, 2, None, "table of classes is damaged"),
        ({"meta": {"CLASSES": ["a", "b"]}}, 19, None, "names 2 classes, but its network has 19"),
    ],
)
def test_names_that_do_not_fit(contents, classes, given, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        labels_of(contents, Path("x.pth"), classes, given)
    assert str(caught.value).startswith("x.pth: ")


@pytest.mark.parametrize(
    "image",
    [
        None,
        np.zeros((3, 4, 3)),
        np.zeros((3, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_what_is_no_picture(model, image):
    with pytest.raises(ValueError, match="image must be"):
        Predictor(model, "cpu")(image)


@pytest.mark.parametrize(
    "options",
    [
        {"scales": ()},
        {"scales": (1, -1)},
        {"scales": 1.0},
        {"scales": "1"},
        {"batch_size": 0},
        {"tile_size": 97},
        {"tile_size": (0, 5)},
        {"tile_size": (5, 5, 5)},
        {"fit": "own"},
        {"fit": 0},
        {"fit": True},
        {"fit": (5,)},
        {"amp": "fp8"},
        {"labels": generic_table(3)},
    ],
    ids=str,
)
def test_impossible_options(model, options):
    with pytest.raises(ValueError, match="must be"):
        Predictor(model, "cpu", **options)


def test_damaged_weights():
    network = build_model(num_classes=2, backbone="resnet18").eval()
    network.head.classifier.bias.data[0] = float("nan")
    with pytest.raises(PredictionError, match="not finite"):
        Predictor(network, "cpu")(picture(9, 9))


def test_the_hub_gives_the_same(model, tmp_path):
    path = tmp_path / "CS_scenes_1.pth"
    network = {"num_classes": 4, "backbone": "resnet18"}
    recipe = {"input_size": (33, 41), "clip": 1, "eval_short_side": 24}
    torch.save(
        {"model": model.state_dict(), "network": network, "recipe": recipe, "data": data_of(TABLE)}, path
    )
    image = picture(40, 50)
    hub = torch.hub.load(str(ROOT), "ccnet", source="local", checkpoint=tmp_path, device="cpu", amp="off")
    assert hub.tile_size == (33, 41)
    assert hub.names == TABLE.names
    sizes = shapes_seen_by(hub)
    here = Predictor(model, "cpu", amp="off")
    here.fit = 24
    assert (hub(image) == here(image)).all()
    assert sizes == [(1, 3, 24, 30)]
    fits = ("auto", 24), (None, None), ((5, 6), (5, 6)), (7, 7)
    assert [Predictor(path, "cpu", fit=fit).fit for fit, _ in fits] == [expected for _, expected in fits]


def test_batches_are_as_large_as_half_of_the_memory_allows(model, monkeypatch):
    predictor = Predictor(model, "cpu", batch_size=4)
    monkeypatch.setattr("evaluation.predictor.available_memory", lambda device: 4 * 800 * 24 * 32)
    shapes = shapes_seen_by(predictor)
    predictor.predict_batch([picture(24, 32)] * 5)
    assert [shape[0] for shape in shapes] == [2, 2, 1]
    predictor.scales = (2.0,)  # four times the pixels
    assert predictor._together((24, 32, 3)) == 1


@pytest.mark.parametrize("recurrence", [None, 1])
def test_the_recurrence_of_a_state_dict(model, tmp_path, recurrence):
    """It is not in the weights: 2 is taken, unless it is given."""
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    predictor = Predictor(tmp_path / "plain.pth", "cpu", num_classes=4, recurrence=recurrence)
    assert predictor.network.head.recurrence == (recurrence or 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_types_predict_in_fp32(model, dtype):
    image = picture(41, 33)
    other = Predictor(copy.deepcopy(model).to(dtype), "cpu", whole=True)
    assert (other(image) == Predictor(model, "cpu", whole=True)(image)).mean() > 0.9


def test_networks_in_memory_are_ours(model):
    with pytest.raises(ValueError, match="must be a Segmenter and has its own R; got Sequential"):
        Predictor(torch.nn.Sequential(model), "cpu")
    with pytest.raises(ValueError, match="has its own R"):
        Predictor(model, "cpu", recurrence=1)


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ({}, TrainedOn()),
        ({"recipe": {"lr": 3}, "settings": "abc"}, TrainedOn()),  # other programs'
        ({"settings": None, "network": "resnet"}, TrainedOn()),
        ({"settings": {"input_size": 224}, "state_dict": {}}, TrainedOn()),
        ({"recipe": {"input_size": [3, 4], "random_affine": True}}, TrainedOn((3, 4), fit=(3, 4))),
        ({"recipe": {"eval_short_side": 180}, "step": 7}, TrainedOn(fit=180, step=7)),
        ({"settings": {"clip": 3, "ignore_label": 0}}, TrainedOn(clip=3, ignore_label=0)),
    ],
)
def test_what_a_checkpoint_was_trained_on(contents, expected):
    assert trained_on(contents, Path("x.pth")) == expected


def test_ids_of_an_old_list_whose_label_0_does_not_count():
    table = labels_of({"settings": {"dataset": "list", "ignore_label": 0}}, Path("x.pth"), 3)
    assert table.ids == (1, 2, 3)
