"""Pictures of predictions."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dataset import Batch, Normalization, Sample, generic_table
from evaluation.pictures import panels, prediction_writer, side_by_side
from evaluation.prediction_files import write_legend
from utils.arguments import OutputError


def test_side_by_side():
    row = side_by_side(np.zeros((4, 5, 3), np.uint8), np.zeros((4, 6, 3), np.uint8))
    assert row.shape == (4, 5 + 2 + 6, 3)
    assert (row[:, 5:7] == 255).all()


@pytest.mark.parametrize("frames", [0, 3])
def test_panels_show_image_label_and_prediction(frames):
    """Of a clip, its first frame."""
    axes = (frames,) if frames else ()
    images, labels = torch.zeros(2, 3, *axes, 9, 17), torch.zeros(2, *axes, 9, 17, dtype=torch.uint8)
    labels[1] = 1
    logits = torch.zeros(2 * (frames or 1), 3, 3, 4)
    logits[-(frames or 1) :, 1] = 1  # of the second sample
    table = generic_table(3)
    if frames:
        images[:, :, 1:], labels[:, 1:] = 3, 255
        logits[:frames][1:, 2] = logits[frames:][1:, 2] = 9  # not of the first frames
    for index, panel in enumerate(
        panels(Batch(images, labels, torch.arange(2)), logits, 5, table, Normalization())
    ):
        assert panel.shape == (9, 3 * 17 + 2 * 2, 3)
        assert tuple(panel[0, 0]) == (123, 117, 104)  # the mean, in RGB
        assert tuple(panel[0, 20]) == tuple(panel[0, -1]) == table.palette[index]
    assert len(panels(Batch(images, labels, torch.arange(2)), logits, 1, table, Normalization())) == 1


@pytest.mark.parametrize("aligned", [True, False])
def test_panels_enlarge_logits_as_the_network_does(aligned):
    torch.manual_seed(0)
    batch = Batch(torch.zeros(1, 3, 18, 34), torch.zeros(1, 18, 34, dtype=torch.uint8), torch.arange(1))
    logits, table = torch.randn(1, 2, 3, 4), generic_table(2)
    (panel,) = panels(batch, logits, 1, table, Normalization(), aligned)
    ids = F.interpolate(logits, (18, 34), mode="bilinear", align_corners=aligned).argmax(1)[0].numpy()
    assert (panel[:, -34:] == table.colour(ids)).all()


def test_what_is_written_of_a_prediction(tmp_path):
    sample = Sample(torch.zeros(3, 4, 6), torch.zeros(4, 6, dtype=torch.uint8), "a")
    prediction_writer(tmp_path, generic_table(3), Normalization())(sample, np.full((4, 6), 2, np.uint8))
    with Image.open(tmp_path / "ids" / "a.png") as ids:
        assert np.unique(np.asarray(ids)) == [2]
    with Image.open(tmp_path / "panels" / "a.png") as panel:
        assert panel.size == (3 * 6 + 2 * 2, 4)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/colour/a.png: cannot write this file \(Not a directory"):
        prediction_writer(tmp_path / "file", generic_table(3), Normalization())(
            sample, np.zeros((4, 6), np.uint8)
        )


def test_a_legend_of_many_classes_has_columns(tmp_path):
    table = generic_table(40)
    write_legend(tmp_path / "legend.png", table)
    legend = np.asarray(Image.open(tmp_path / "legend.png"))
    width = (legend.shape[1] - 8) // 2
    for index in (29, 30, 39):
        top, left = 8 + 28 * (index % 30), 8 + width * (index // 30)
        assert tuple(legend[top + 5, left + 5]) == table.palette[index]
