"""Evaluation from the command line, held against the benchmark's own scripts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import find_dataset, list_samples
from networks import build_model
from tests.scripts.conftest import THIN
from utils.checkpoint import load_checkpoint

QUIET = ("--gpu", "cpu", "--num-workers", "0")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def evaluated(call, demo_data, trained, tmp_path):
    """The result of a plain evaluation with its pictures."""
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", trained, "--output-dir", tmp_path,
        "--whole", "--save", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    return result, tmp_path


@pytest.mark.filterwarnings("ignore")  # of the foreign package
def test_scores_are_those_of_the_benchmarks_own_scripts(call, demo_data, tmp_path):
    scripts = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    torch.manual_seed(0)
    model = build_model(backbone="thin")
    model.head.classifier.weight.data.normal_()  # predicts a bit of everything
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path / "plain.pth", "--save",
        "--backbone", "thin", "--input-size", "49,57", "--output-dir", tmp_path, *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    pairs = list_samples(find_dataset(demo_data), demo_data, "val")
    predictions = [str(tmp_path / "ids" / f"{pair.image.stem}.png") for pair in pairs]
    scripts.args.evalInstLevelScore = scripts.args.JSONOutput = False
    scripts.args.quiet = True
    official = scripts.evaluateImgLists(predictions, [str(pair.label) for pair in pairs], scripts.args)

    ours = metrics_of(tmp_path)
    assert ours["mIoU"] == pytest.approx(official["averageScoreClasses"], abs=1e-9)
    assert len(ours["IoU"]) == 19
    for name, value in ours["IoU"].items():
        expected = official["classScores"][name]
        assert value == pytest.approx(expected, abs=1e-9) if value is not None else np.isnan(expected)
    assert sum(value is not None and value > 0 for value in ours["IoU"].values()) >= 3


def test_table_and_files(evaluated, demo_data, trained):
    result, folder = evaluated
    metrics = metrics_of(folder)
    assert f"mIoU {100 * metrics['mIoU']:.2f} over 3 images" in result.out
    assert "traffic light" in result.out
    settings = metrics["settings"]
    assert (settings["backbone"], settings["recurrence"], settings["step"]) == ("thin", 2, 2)
    assert settings["checkpoint"] == str(trained)
    counted = sum(map(sum, metrics["confusion_matrix"]))
    labels = [find_dataset(demo_data).labels.encode(np.array(Image.open(pair.label))) for pair in
              list_samples(find_dataset(demo_data), demo_data, "val")]  # fmt: skip
    assert counted == sum((label != 255).sum() for label in labels)

    for name in (path.name for path in (folder / "ids").iterdir()):
        ids, colour = (np.array(Image.open(folder / kind / name)) for kind in ("ids", "colour"))
        table = find_dataset(demo_data).labels
        assert (table.colour(table.encode(ids)) == colour).all()
        panel = np.array(Image.open(folder / "panels" / name))
        assert panel.shape == (64, 3 * 128 + 2 * 2, 3)
        assert (panel[:, -128:] == colour).all()


@pytest.mark.parametrize(
    "options", [(), ("--whole", "--scales", "0.75,1,1.25", "--flip"), ("--flip", "--batch-size", "1")]
)
def test_protocols(call, demo_data, trained, tmp_path, options):
    arguments = ("--data-dir", demo_data, "--restore-from", trained.parent, "--output-dir", tmp_path)
    result = call("evaluate.py", *arguments, *QUIET, *options)
    assert result.status == 0, result.error
    assert metrics_of(tmp_path)["settings"]["input_size"] == [33, 41]  # the training crop


def test_the_loss_of_a_checkpoint_need_not_be_known(call, demo_data, trained, tmp_path):
    contents = load_checkpoint(trained)
    contents["recipe"]["criterion"] = "my_loss"
    torch.save(contents, tmp_path / "x.pth")
    options = ("--restore-from", tmp_path / "x.pth", "--output-dir", tmp_path, *QUIET)
    result = call("evaluate.py", "--data-dir", demo_data, *options)
    assert result.status == 0, result.error
    assert metrics_of(tmp_path)["settings"]["step"] == 2


def test_a_plain_state_dict_with_another_r(call, demo_data, tmp_path):
    torch.save(build_model(backbone="thin").state_dict(), tmp_path / "plain.pth")
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path / "plain.pth", "--whole",
        "--backbone", "thin", "--recurrence", 3, "--output-dir", tmp_path / "out", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert metrics_of(tmp_path / "out")["settings"]["recurrence"] == 3


def test_images_without_labels_are_predicted_not_scored(call, demo_data, trained, tmp_path):
    spec = find_dataset(demo_data)
    images = [pair.image.relative_to(demo_data) for pair in list_samples(spec, demo_data, "val")]
    (tmp_path / "test.lst").write_text("".join(f"{image}\n" for image in images))
    arguments = ("--data-dir", demo_data, "--data-list", tmp_path / "test.lst", "--restore-from", trained,
                 "--whole", "--output-dir", tmp_path / "out", *QUIET)  # fmt: skip
    result = call("evaluate.py", *arguments)
    assert result.status == 1
    assert "no label to be scored against; --save keeps the predictions" in result.error
    result = call("evaluate.py", *arguments, "--save")
    assert result.status == 0, result.error
    assert "no scores" in result.out
    assert len(list((tmp_path / "out" / "ids").iterdir())) == 3
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_metrics_of_an_earlier_evaluation_do_not_outlive_it(call, demo_data, trained, tmp_path):
    (tmp_path / "metrics.json").write_text("{}")
    image, label = list_samples(find_dataset(demo_data), demo_data, "val")[0]
    (tmp_path / "x.lst").write_text(f"{image}\n")
    arguments = (
        "--data-dir",
        demo_data,
        "--restore-from",
        trained,
        "--output-dir",
        tmp_path,
        "--save",
        *QUIET,
    )
    assert call("evaluate.py", *arguments, "--data-list", tmp_path / "x.lst").status == 0
    assert not (tmp_path / "metrics.json").exists()
    (tmp_path / "x.lst").write_text(f"{image}\n{image}\t{label}\n")
    result = call("evaluate.py", *arguments, "--data-list", tmp_path / "x.lst")
    assert "over 1 images" in result.out
    assert metrics_of(tmp_path)["settings"]["images"] == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"network": None}, "NoneType"),
        ({"network": []}, "list"),
        ({"network": {"backbone": "resnet34"}}, "'resnet34'"),
        ({"network": {"recurrence": "2"}}, "recurrence must be a whole number; got '2'"),
        ({"network": {"depth": 18}}, "depth"),
        ({"recipe": None}, "not named values"),
        ({"recipe": {"input_size": (0, 0)}}, "input_size"),
        # As it was called before there were recipes.
        ({"settings": None}, "not named values"),
        ({"settings": []}, "not named values"),
        ({"settings": {"backbone": "resnet34"}}, "'resnet34'"),
        ({"settings": {"recurrence": "2"}}, "recurrence must be a whole number; got '2'"),
        ({"settings": {"backbone": "thin", "input_size": (0, 0)}}, "input_size"),
    ],
    ids=str,
)
def test_settings_that_make_no_network(call, demo_data, trained, tmp_path, change, reason):
    contents = load_checkpoint(trained)
    if "settings" in change:
        contents = {name: contents[name] for name in ("model", "step")}
    torch.save(contents | change, tmp_path / "x.pth")
    output = ("--output-dir", tmp_path / "out")
    result = call(
        "evaluate.py", "--data-dir", demo_data, "--restore-from", tmp_path / "x.pth", *output, *QUIET
    )
    assert result.status == 1
    assert result.error.startswith(f"evaluate.py: error: {tmp_path / 'x.pth'}: ")
    assert reason in result.error
    assert "resumed" not in result.error  # nobody asked for that
    assert result.error.count("\n") == 1


def test_another_number_of_classes(call, list_data, trained, tmp_path):
    data = ("--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst")
    output = ("--num-classes", 3, "--output-dir", tmp_path / "out", *QUIET)
    result = call("evaluate.py", *data, "--restore-from", trained, *output)
    assert result.status == 1
    message = f"{trained}: has 19 classes (road, sidewalk, …), list has 3"
    assert result.error == f"evaluate.py: error: {message}\n"
    torch.save(build_model(backbone="resnet18", num_classes=4).state_dict(), tmp_path / "plain.pth")
    result = call("evaluate.py", *data, "--restore-from", tmp_path / "plain.pth", *output)
    assert "plain.pth: has 4 classes, list has 3" in result.error


def test_an_output_folder_that_cannot_be_made(call, demo_data, trained, tmp_path):
    (tmp_path / "file").touch()
    arguments = (
        "--data-dir",
        demo_data,
        "--restore-from",
        trained,
        "--output-dir",
        tmp_path / "file",
        *QUIET,
    )
    result = call("evaluate.py", *arguments)
    assert result.status == 1
    assert result.error == f"evaluate.py: error: {tmp_path}/file: cannot write results there (File exists)\n"


def test_a_perfect_network_scores_one(call, list_data, tmp_path):
    """Labels that are all one class, and a network that says so: the whole chain must report 1."""
    for path in (list_data / "labels").iterdir():
        Image.fromarray(np.full((20, 30), 2, np.uint8)).save(path)
    model = build_model(num_classes=3, backbone="thin")
    model.head.classifier.weight.data.zero_()
    model.head.classifier.bias.data = torch.tensor([0.0, 0.0, 1.0])
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    result = call(
        "evaluate.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--num-classes", 3, "--restore-from", tmp_path / "plain.pth", "--backbone", "thin",
        "--input-size", "17,17", "--output-dir", tmp_path, *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    metrics = metrics_of(tmp_path)
    assert metrics["mIoU"] == metrics["pixel_accuracy"] == 1.0
    assert metrics["IoU"] == {"class 0": None, "class 1": None, "class 2": 1.0}


def test_camvid(call, camvid, tmp_path):
    (tmp_path / "two.lst").write_text("\n".join((camvid / "val.txt").read_text().splitlines()[:2]))
    train = ("--data-dir", camvid, "--snapshot-dir", tmp_path, *THIN, "--batch-size", 2, "--num-steps", 1)
    assert call("train.py", *train).status == 0
    result = call(
        "evaluate.py", "--data-dir", camvid, "--data-list", tmp_path / "two.lst", "--whole",
        "--restore-from", tmp_path, "--output-dir", tmp_path / "out", *QUIET,
    )  # fmt: skip
    assert result.status == 0, result.error
    assert next(iter(metrics_of(tmp_path / "out")["IoU"])) == "sky"


def test_class_names_that_contradict_the_data_set(call, demo_data, trained, tmp_path):
    """In another order they would give wrong scores; other words may mean the same."""
    contents = load_checkpoint(trained)
    names = contents["data"]["names"]
    options = (
        "--data-dir",
        demo_data,
        "--restore-from",
        tmp_path / "x.pth",
        "--output-dir",
        tmp_path,
        *QUIET,
    )
    contents["data"]["names"] = names[::-1]
    torch.save(contents, tmp_path / "x.pth")
    result = call("evaluate.py", *options)
    assert result.status == 1
    assert "in another order: class 0 is bicycle in the checkpoint, road in cityscapes" in result.error
    contents["data"]["names"] = ("street", *names[1:])
    torch.save(contents, tmp_path / "x.pth")
    result = call("evaluate.py", *options)
    assert result.status == 0, result.error
    assert "class 0 is street in the checkpoint, road in cityscapes" in result.out
    contents["data"]["names"] = tuple(f"class {i}" for i in range(19))
    torch.save(contents, tmp_path / "x.pth")
    assert "note" not in call("evaluate.py", *options).out


def test_a_report_of_an_earlier_evaluation_does_not_outlive_it(call, demo_data, trained, tmp_path):
    options = ("--data-dir", demo_data, "--restore-from", trained, "--output-dir", tmp_path, *QUIET)
    assert call("evaluate.py", *options, "--report").status == 0
    assert (tmp_path / "report.html").exists()
    assert call("evaluate.py", *options).status == 0
    assert not (tmp_path / "report.html").exists()


def test_the_classes_of_a_list_are_the_networks(call, list_data, tmp_path):
    torch.save(build_model(backbone="resnet18", num_classes=3).state_dict(), tmp_path / "plain.pth")
    data = ("--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst")
    result = call(
        "evaluate.py", *data, "--restore-from", tmp_path / "plain.pth", "--output-dir", tmp_path, *QUIET,
        "--input-size", "49,57",
    )  # fmt: skip
    assert result.status == 0, result.error
