"""evaluate.py --report, --compare and --submission, as users run them."""

import html.parser
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import EvaluationDataset, Normalization, Sample, find_dataset, list_samples
from evaluation.metrics import ConfusionMatrix
from evaluation.report import ImageReports, protocol_differences, report_page
from evaluation.submission import Submission

QUIET = ("--gpu", "cpu", "--num-workers", "0", "--whole")


class Page(html.parser.HTMLParser):
    """Texts, addresses and unclosed elements of a page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_report_comparison_and_submission(call, demo_data, trained, tmp_path):
    common = ("evaluate.py", "--data-dir", demo_data, "--restore-from", trained, *QUIET)
    result = call(*common, "--output-dir", tmp_path / "a", "--report", "--submission", tmp_path / "out.zip")
    assert result.status == 0, result.error
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out.zip"}
    spec = find_dataset(demo_data)
    pairs = list_samples(spec, demo_data, "val")
    with zipfile.ZipFile(tmp_path / "out.zip") as packed:
        stems = [pair.image.stem.removesuffix("_leftImg8bit") for pair in pairs]
        assert packed.namelist() == [f"{stem}_pred_labelIds.png" for stem in stems]
        matrix = ConfusionMatrix(19)
        for pair, name in zip(pairs, packed.namelist(), strict=True):
            with packed.open(name) as file:
                ids = np.array(Image.open(file))
            label = spec.labels.encode(np.array(Image.open(pair.label)))
            assert ids.shape == label.shape
            assert set(np.unique(ids)) <= set(spec.labels.ids)
            matrix.update(torch.from_numpy(spec.labels.encode(ids)), torch.tensor(label))
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["confusion_matrix"] == matrix.counts.tolist()

    other = dict(metrics, IoU={**metrics["IoU"], "road": (metrics["IoU"]["road"] or 0) + 0.25})
    (tmp_path / "other.json").write_text(json.dumps(other))
    result = call(*common, "--output-dir", tmp_path / "a", "--report", "--compare", tmp_path / "other.json")
    assert result.status == 0, result.error
    text = (tmp_path / "a" / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.addresses
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", text)
    assert f"{100 * metrics['mIoU']:.2f}" in page.texts
    assert "-25.00" in page.texts
    assert "scored otherwise" not in result.out + text
    assert text.count("<figure>") == 3  # each image once, though there are fewer than asked for
    assert trained.name in "".join(page.texts)


def test_the_protocols_of_a_comparison(call, demo_data, trained, tmp_path):
    common = ("evaluate.py", "--data-dir", demo_data, "--restore-from", trained, "--output-dir", tmp_path)
    assert call(*common, *QUIET).status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["settings"] |= {"input_size": [9, 9], "scales": [0.5, 1.0], "fit": [9, 9]}
    metrics["settings"] |= {"images": 2, "split": "test"}
    (tmp_path / "other.json").write_text(json.dumps(metrics))
    result = call(*common, *QUIET, "--report", "--compare", tmp_path / "other.json")
    assert result.status == 0, result.error
    differs = "split is val, there test; images is 3, there 2; scales is 1.0, there 0.5, 1.0"
    differs += "; fit is none, there 9, 9"
    assert f"other.json was scored otherwise: {differs}\n" in result.out
    assert f"It was scored otherwise: {differs}.</p>" in (tmp_path / "report.html").read_text()
    metrics["settings"]["dataset"] = "camvid"
    (tmp_path / "other.json").write_text(json.dumps(metrics))
    result = call(*common, *QUIET, "--report", "--compare", tmp_path / "other.json")
    assert result.status == 1
    assert "other.json: scores camvid; this data set is cityscapes" in result.error


@pytest.mark.parametrize("wholes", [(True, True), (True, False), (False, False)])
def test_tiles_are_of_the_sliding_window(wholes):
    now, before = ({"settings": {"whole": whole, "input_size": 9 + whole}} for whole in wholes)
    before["settings"]["input_size"] = [7, 7]
    assert ("input_size" in protocol_differences(now, before)) == (wholes != (True, True))
    assert not protocol_differences(now, {})


@pytest.fixture
def samples(demo_data):
    spec = find_dataset(demo_data)
    pairs = list_samples(spec, demo_data, "val")
    return spec, list(EvaluationDataset(pairs, spec.labels, Normalization(), 255))


def spoiled(sample, rows):
    """The label as a prediction, wrong in its first rows."""
    prediction = sample.label.numpy().copy()
    prediction[prediction == 255] = 0
    prediction[:rows] = (prediction[:rows] + 1) % 19
    return prediction


def test_worst_and_best(samples):
    spec, images = samples
    reports = ImageReports(1, spec.labels, 255, Normalization())
    for sample, rows in zip(images, (20, 40, 0), strict=True):
        reports(sample, spoiled(sample, rows))
    assert [report.name for report in reports.worst] == [images[1].name]
    assert [report.name for report in reports.best] == [images[2].name]
    assert reports.best[0].miou == 1
    prediction, label = spoiled(images[1], 40), images[1].label.numpy()
    ious = [
        ((prediction == k) & (label == k)).sum() / (((prediction == k) & (label != 255)) | (label == k)).sum()
        for k in np.unique(label)
        if k != 255
    ]
    assert reports.worst[0].miou == pytest.approx(np.mean(ious))
    # Those of another process, the same ones among them.
    reports.add([*reports.worst, *reports.best])
    assert (len(reports.worst), len(reports.best)) == (1, 1)
    reports(Sample(images[0].image, None, "unlabelled"), prediction)
    reports(Sample(images[0].image, torch.full_like(images[0].label, 255), "ignored"), prediction)
    assert [report.name for report in reports.worst] == [images[1].name]


def test_no_images_are_asked_for(samples):
    spec, images = samples
    reports = ImageReports(0, spec.labels, 255, Normalization())
    reports(images[0], spoiled(images[0], 20))
    assert not reports.worst
    assert not reports.best


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 1, 1]])
def test_how_many_classes_the_mean_is_of(labels):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor(labels), torch.tensor(labels))
    settings = {"checkpoint": "c.pth", "model": "ccnet", "dataset": "d", "split": "s", "images": 1}
    metrics = matrix.summary(("a", "b", "c")) | {"settings": settings}
    text = report_page(metrics, ((0, 0, 0),) * 3, ImageReports(0, None, 255, Normalization()), {})
    assert ("mean of 2 of 3 classes" in text) is (labels == [0, 1, 1])


def test_names_are_text_not_markup():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    names = ("<b>road", "sky & sea")
    settings = {"checkpoint": "c<i>.pth", "model": "ccnet", "dataset": "d", "split": "s", "images": 1}
    metrics = matrix.summary(names) | {"settings": settings}
    reports = ImageReports(0, None, 255, Normalization())
    text = report_page(metrics, ((1, 2, 3), (4, 5, 6)), reports, {"torch": None})
    assert "<b>road" not in text
    assert "<i>.pth" not in text
    assert "&lt;b&gt;road taken for sky &amp; sea 50.0 %" in text


def test_parts_of_several_processes_are_joined(samples, tmp_path):
    spec, images = samples
    parts = [Submission(tmp_path / "out.zip", spec.labels, rank, 2) for rank in range(2)]
    for index, sample in enumerate(images):
        parts[index % 2](sample, spoiled(sample, 0))
    for part in parts:
        part.close()
    assert parts[0].finish() == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out.zip"]
    with zipfile.ZipFile(tmp_path / "out.zip") as packed:
        assert len(set(packed.namelist())) == 3
        assert packed.testzip() is None


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--compare", "metrics.json"), 2, "--compare needs --report"),
        (("--submission", "out.tar"), 2, "the ending must be .zip"),
        (("--report", "--compare", "none.json"), 1, "none.json: cannot read these scores"),
        (("--report", "--compare", "text.json"), 1, "text.json: is no metrics.json of evaluate.py"),
        (("--report", "--compare", "two.json"), 1, "scores 2 classes that are not the 19"),
        (("--report", "--split", "test"), 1, "_leftImg8bit.png has no label to be scored"),
        (("--submission", "text.json/out.zip"), 1, "cannot write there"),
        (("--submission", "folder.zip"), 1, "folder.zip: is a folder"),
    ],
)
def test_bad_input(call, demo_data, trained, tmp_path, monkeypatch, flags, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "text.json").write_text("[1]")
    (tmp_path / "two.json").write_text('{"mIoU": 0.5, "IoU": {"a": 1, "b": 0}}')
    data = demo_data
    if "test" in flags:
        data = tmp_path / "data"
        city = data / "leftImg8bit" / "test" / "berlin"
        city.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(city / "berlin_000000_000019_leftImg8bit.png")
    result = call("evaluate.py", "--data-dir", data, "--restore-from", trained, *QUIET, *flags)
    assert result.status == status
    assert message in result.error
    assert len(result.error.strip().splitlines()) == 1


def test_submission_is_for_cityscapes(call, list_data, trained, tmp_path):
    result = call(
        "evaluate.py", "--data-dir", list_data, "--dataset", "list", "--data-list", list_data / "train.lst",
        "--restore-from", trained, "--submission", tmp_path / "out.zip", *QUIET,
    )  # fmt: skip
    assert result.status == 2
    assert "Cityscapes' server; this data set is list" in result.error
    assert not list(tmp_path.glob("*.zip"))
