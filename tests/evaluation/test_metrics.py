"""The confusion matrix against counting by hand."""

import json

import numpy as np
import pytest
import torch

from evaluation.metrics import ConfusionMatrix


def test_equals_counting_by_hand():
    rng = np.random.default_rng(0)
    matrix = ConfusionMatrix(4)
    intersection, union, labelled, right, total = np.zeros(4), np.zeros(4), np.zeros(4), 0, 0
    for _ in range(3):
        label, prediction = rng.integers(0, 4, (7, 9)), rng.integers(0, 4, (7, 9))
        label[rng.random((7, 9)) < 0.3] = 255
        matrix.update(torch.from_numpy(prediction.astype(np.uint8)), torch.from_numpy(label.astype(np.uint8)))
        valid = label != 255
        right, total = right + (valid & (label == prediction)).sum(), total + valid.sum()
        for c in range(4):
            intersection[c] += (valid & (label == c) & (prediction == c)).sum()
            union[c] += (valid & ((label == c) | (prediction == c))).sum()
            labelled[c] += (label == c).sum()
    np.testing.assert_allclose(matrix.iou().numpy(), intersection / union, rtol=1e-14)
    np.testing.assert_allclose(matrix.class_accuracy().numpy(), intersection / labelled, rtol=1e-14)
    assert matrix.mean_iou() == pytest.approx((intersection / union).mean(), rel=1e-14)
    assert matrix.pixel_accuracy() == pytest.approx(right / total, rel=1e-14)


def test_a_class_that_does_not_occur_is_left_out_of_the_mean():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0]))
    assert matrix.iou()[:2].tolist() == pytest.approx([2 / 3, 0.0])
    assert matrix.mean_iou() == pytest.approx(1 / 3)
    summary = json.loads(json.dumps(matrix.summary(("a", "b", "c"))))
    assert summary["IoU"] == {"a": pytest.approx(2 / 3), "b": 0.0, "c": None}
    assert summary["scored_classes"] == 2
    assert summary["accuracy"]["b"] is None
    assert summary["confusion_matrix"] == [[2, 1, 0], [0, 0, 0], [0, 0, 0]]
    rows = [line.split() for line in matrix.table(("a", "b", "c")).splitlines()]
    assert ["a", "66.67", "66.67", "100.00"] in rows
    assert ["c", "-", "-", "0.00"] in rows
    assert ["mean", "33.33", "66.67"] in rows


def test_nothing_counted():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0]), torch.tensor([255]))
    assert matrix.summary(("a", "b"))["mIoU"] is None


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(3, 2\)"):
        ConfusionMatrix(2).update(torch.zeros(2, 3), torch.zeros(3, 2))
