"""One HTML file about an evaluation: scores, confusions, worst and best images. It needs no other file."""

import base64
import heapq
import html
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from dataset import DataError, LabelTable, Normalization, Sample
from evaluation.metrics import ConfusionMatrix

PANEL_WIDTH = 640  # pixels; larger pictures are reduced
WRONG = (213, 94, 0)  # vermilion, which colour-blind people tell from grey
MOST_NAMED = 60  # a matrix of more classes has no names beside it, they would be too small to read
CONFUSIONS = 8  # named in words
# Settings without which two runs' scores are not of the same images or not got the same way.
PROTOCOL = ("split", "images", "whole", "scales", "short_sides", "fit", "flip", "input_size", "clip")


@dataclass(frozen=True, order=True)
class ImageReport:
    """An image's score and its panels, as the URLs of pictures that hold their data."""

    miou: float  # over the classes that are labelled in this image
    name: str
    accuracy: float
    panels: tuple[tuple[str, str], ...]  # (caption, URL)


class ImageReports:
    """Collects the images with the lowest and the highest mIoU; a ``pictures.Save``.

    Args:
        count: how many of each are kept.
        labels, ignore_label, normalization: of the data set that samples come from.
    """

    def __init__(
        self, count: int, labels: LabelTable, ignore_label: int, normalization: Normalization
    ) -> None:
        self.count, self.labels = count, labels
        self.ignore_label, self.normalization = ignore_label, normalization
        self.worst: list[ImageReport] = []
        self.best: list[ImageReport] = []

    def __call__(self, sample: Sample, prediction: np.ndarray) -> None:
        """Score a prediction, train ids (H,W) uint8; its panels are made only if it is to be kept."""
        if sample.label is None or not self.count:
            return
        matrix = ConfusionMatrix(self.labels.num_classes, self.ignore_label)
        matrix.update(torch.from_numpy(prediction), sample.label)
        labelled = matrix.counts.sum(dim=1) > 0
        if not labelled.any():
            return
        miou = float(matrix.iou()[labelled].mean())
        rank = (miou, sample.name)
        is_bad = len(self.worst) < self.count or rank < (self.worst[-1].miou, self.worst[-1].name)
        is_good = len(self.best) < self.count or rank > (self.best[-1].miou, self.best[-1].name)
        if is_bad or is_good:
            report = ImageReport(miou, sample.name, matrix.pixel_accuracy(), self._panels(sample, prediction))
            self.add([report])

    def add(self, reports: Sequence[ImageReport]) -> None:
        """Take in reports, also those of another process; images that are here already do not count twice."""
        by_name = {report.name: report for report in (*self.worst, *self.best, *reports)}
        self.worst = heapq.nsmallest(self.count, by_name.values())
        self.best = heapq.nlargest(self.count, by_name.values())

    def _panels(self, sample: Sample, prediction: np.ndarray) -> tuple[tuple[str, str], ...]:
        assert sample.label is not None
        image = sample.image if sample.image.dim() == 3 else sample.image[:, sample.scored]
        picture, label = self.normalization.to_rgb(image.numpy()), sample.label.numpy()
        counted = label != self.ignore_label
        grey = picture.mean(axis=2, keepdims=True).repeat(3, axis=2) * 0.5 + 110
        errors = np.where((counted & (label != prediction))[..., None], WRONG, grey)
        errors = np.where(counted[..., None], errors, 235).astype(np.uint8)
        return (
            ("picture", data_url(picture, is_photo=True)),
            ("label", data_url(self.labels.colour(label))),
            ("prediction", data_url(self.labels.colour(prediction))),
            ("errors", data_url(errors, is_photo=True)),
        )


def data_url(picture: np.ndarray, is_photo: bool = False) -> str:
    """A picture (H,W,3) uint8 RGB as a URL: JPEG for photographs, PNG for flat colours."""
    image, file = Image.fromarray(picture), io.BytesIO()
    if image.width > PANEL_WIDTH:
        size = (PANEL_WIDTH, max(round(image.height * PANEL_WIDTH / image.width), 1))
        image = image.resize(size, Image.Resampling.BOX if is_photo else Image.Resampling.NEAREST)
    if is_photo:
        image.save(file, "jpeg", quality=85)
    else:
        image.convert("P", palette=Image.Palette.ADAPTIVE).save(file, "png", optimize=True)
    kind = "jpeg" if is_photo else "png"
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def read_metrics(path: Path) -> dict[str, Any]:
    """The ``metrics.json`` of an earlier evaluation.

    Raises:
        DataError: it cannot be read, or is something else.
    """
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(metrics["IoU"], dict) or "mIoU" not in metrics:
            raise KeyError("IoU")
    except OSError as error:
        raise DataError(f"{path}: cannot read these scores ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: is no metrics.json of evaluate.py") from None
    return dict(metrics)


def check_comparable(other: Mapping[str, Any], dataset: str, names: Sequence[str], path: Path) -> None:
    """Refuse scores of another data set or other classes.

    Raises:
        DataError: the data set or the classes differ.
    """
    other_dataset = _settings(other).get("dataset", dataset)
    if other_dataset != dataset:
        raise DataError(f"{path}: scores {other_dataset}; this data set is {dataset}")
    if list(other["IoU"]) != list(names):
        raise DataError(
            f"{path}: scores {len(other['IoU'])} classes that are not the {len(names)} of this data set"
        )


def protocol_differences(metrics: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In which images and test protocol two runs differ, in words; empty: in nothing that they tell."""
    now, before = _settings(metrics), _settings(other)
    names = [name for name in PROTOCOL if name in now and name in before]
    if now.get("whole") and before.get("whole"):
        names = [name for name in names if name != "input_size"]  # of tiles
    values = [(name, *(_in_words(settings[name]) for settings in (now, before))) for name in names]
    return "; ".join(f"{name} is {here}, there {there}" for name, here, there in values if here != there)


def report_page(
    metrics: Mapping[str, Any],
    palette: Sequence[tuple[int, int, int]],
    images: ImageReports,
    versions: Mapping[str, object],
    other: tuple[str, Mapping[str, Any]] | None = None,
) -> str:
    """The page, HTML.

    Args:
        metrics: what ``metrics.json`` holds.
        palette: RGB colour of each class.
        images: the worst and the best.
        versions: of the program and what it stands on, by name.
        other: the name and the metrics of a run to compare with, see ``check_comparable``.
    """
    settings = metrics["settings"]
    names = list(metrics["IoU"])
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    checkpoint = Path(str(settings["checkpoint"]))
    comparison = ""
    if other is not None:
        differs = protocol_differences(metrics, other[1])
        comparison = (
            f'<p class="note">Compared with {_text(other[0])}: the mark on a bar is its IoU.'
            f"{_text(f' It was scored otherwise: {differs}.') if differs else ''}</p>"
        )
    return template.substitute(
        title=_text(f"{settings['model']} on {settings['dataset']}"),
        subtitle=_text(f"{checkpoint.name}, split {settings['split']}, {settings['images']} images"),
        figures=_figures(metrics, None if other is None else other[1]),
        comparison=comparison,
        classes=_class_table(metrics, palette, None if other is None else other[1]),
        matrix=_matrix(metrics["confusion_matrix"], names),
        confusions=_confusions(metrics["confusion_matrix"], names),
        images=_images("Worst images", images.worst)
        + _images("Best images", [report for report in images.best if report not in images.worst]),
        settings=_rows({**settings, **versions}),
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _in_words(value: object) -> str:
    """A setting as a reader takes it in; lists come from JSON where tuples were."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _settings(metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    settings = metrics.get("settings")
    return settings if isinstance(settings, Mapping) else {}


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _change(now: float | None, before: float | None) -> str:
    """The difference of two shares in percentage points, with its sign."""
    if now is None or before is None:
        return "–"
    points = round(100 * (now - before), 2) + 0.0
    kind = "better" if points > 0 else "worse" if points < 0 else ""
    return f'<span class="{kind}">{points:+.2f}</span>'


def _figures(metrics: Mapping[str, Any], other: Mapping[str, Any] | None) -> str:
    items = []
    for key, title in (
        ("mIoU", "mean IoU"),
        ("mean_accuracy", "mean accuracy"),
        ("pixel_accuracy", "pixel accuracy"),
    ):
        before = ""
        if other is not None:
            value = other.get(key)
            before = f'<div class="soft">{_percent(value)} → {_change(metrics[key], value)}</div>'
        mean_of = ""
        if key == "mIoU" and metrics["scored_classes"] < len(metrics["IoU"]):
            words = f"mean of {metrics['scored_classes']} of {len(metrics['IoU'])} classes"
            mean_of = f'<div class="soft">{words}</div>'
        items.append(f"<li><b>{_percent(metrics[key])}</b>{title}, %{mean_of}{before}</li>")
    if speed := metrics.get("images_per_second"):
        items.append(f"<li><b>{speed:.3g}</b>images/s</li>")
    return "".join(items)


def _class_table(
    metrics: Mapping[str, Any], palette: Sequence[tuple[int, int, int]], other: Mapping[str, Any] | None
) -> str:
    matrix = np.array(metrics["confusion_matrix"], dtype=np.float64)
    shares = matrix.sum(axis=1) / max(matrix.sum(), 1)
    more = "" if other is None else '<th class="wide">other</th><th>change</th>'
    head = f'<th>class</th><th></th><th>IoU</th>{more}<th>acc.</th><th class="wide">pixels</th>'
    lines = [f"<thead><tr>{head}</tr></thead><tbody>"]
    for (name, iou), colour, share in zip(metrics["IoU"].items(), palette, shares, strict=True):
        before = None if other is None else other["IoU"][name]
        mark = "" if before is None else f'<u style="left:{100 * before:.2f}%"></u>'
        more = (
            ""
            if other is None
            else f'<td class="wide">{_percent(before)}</td><td>{_change(iou, before)}</td>'
        )
        lines.append(
            f'<tr><td><span class="swatch" style="background:rgb{tuple(colour)}"></span>{_text(name)}</td>'
            f'<td class="bar"><div class="track"><i style="width:{100 * (iou or 0):.2f}%"></i>{mark}</div>'
            "</td>"
            f"<td>{_percent(iou)}</td>{more}<td>{_percent(metrics['accuracy'][name])}</td>"
            f'<td class="wide">{_percent(share)}</td></tr>'
        )
    more = ""
    if other is not None:
        change = _change(metrics["mIoU"], other["mIoU"])
        more = f'<td class="wide">{_percent(other["mIoU"])}</td><td>{change}</td>'
    lines.append(
        f"</tbody><tfoot><tr><td>mean</td><td></td><td>{_percent(metrics['mIoU'])}</td>{more}"
        f'<td>{_percent(metrics["mean_accuracy"])}</td><td class="wide"></td></tr></tfoot>'
    )
    return "\n".join(lines)


def _row_shares(matrix: Sequence[Sequence[int]]) -> np.ndarray:
    counts = np.array(matrix, dtype=np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _matrix(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The matrix as a picture of one pixel a cell, enlarged, with names where there is room."""
    # The square root shows confusions of a per cent, which a linear scale would leave white.
    depth = np.sqrt(_row_shares(matrix))[..., None]
    light, dark = np.array([247, 250, 252.0]), np.array([8, 48, 107.0])
    cells = np.rint(light + depth * (dark - light)).astype(np.uint8)
    count, size = len(names), 20
    file = io.BytesIO()
    Image.fromarray(cells).save(file, "png")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    is_named = count <= MOST_NAMED
    margin = 9 * max(len(name) for name in names) + 10 if is_named else 0
    extent = count * size
    lines = [
        f'<svg viewBox="0 0 {margin + extent} {margin + extent}" role="img" aria-label="confusion matrix" '
        f'style="max-width:{1.5 * (margin + extent):.0f}px">',
        f'<image href="{url}" x="{margin}" y="{margin}" width="{extent}" height="{extent}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>',
        f'<rect x="{margin}" y="{margin}" width="{extent}" height="{extent}" fill="none" stroke="#9aa5b0"/>',
    ]
    for index, name in enumerate(names if is_named else ()):
        middle = margin + (index + 0.5) * size
        lines.append(
            f'<text x="{margin - 6}" y="{middle}" text-anchor="end" dominant-baseline="central" '
            f'font-size="15">{_text(name)}</text>'
            f'<text transform="translate({middle},{margin - 6}) rotate(-90)" dominant-baseline="central" '
            f'font-size="15">{_text(name)}</text>'
        )
    return "\n".join([*lines, "</svg>"])


def _confusions(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The largest shares beside the diagonal, in words."""
    shares = _row_shares(matrix)
    np.fill_diagonal(shares, 0)
    order = np.argsort(shares, axis=None, kind="stable")[::-1][:CONFUSIONS]
    found = [(divmod(int(index), len(names)), float(shares.flat[index])) for index in order]
    words = [
        f"{_text(names[label])} taken for {_text(names[taken])} {100 * share:.1f} %"
        for (label, taken), share in found
        if share > 0
    ]
    return "Most frequent: " + "; ".join(words) + "." if words else "No pixel is confused."


def _images(title: str, reports: Sequence[ImageReport]) -> str:
    if not reports:
        return ""
    lines = [f"<h2>{title}</h2>"]
    if title.startswith("Worst"):
        lines.append(
            '<p class="soft">By the mean IoU of the classes labelled in an image. '
            "Errors are orange; pixels without a label are nearly white.</p>"
        )
    for report in reports:
        pictures = "".join(
            f'<div><img src="{url}" alt="{caption} of {_text(report.name)}" loading="lazy">'
            f"<span>{caption}</span></div>"
            for caption, url in report.panels
        )
        caption = (
            f"<b>{_text(report.name)}</b> · mIoU {_percent(report.miou)} % · "
            f"pixel accuracy {_percent(report.accuracy)} %"
        )
        lines.append(
            f'<figure><figcaption>{caption}</figcaption><div class="panels">{pictures}</div></figure>'
        )
    return "\n".join(lines)


def _rows(values: Mapping[str, object]) -> str:
    rows = []
    for name, value in values.items():
        rows.append(f"<tr><th>{_text(name)}</th><td>{_text(_in_words(value))}</td></tr>")
    return "\n".join(rows)
