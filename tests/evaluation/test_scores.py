"""Scores during training."""

from itertools import islice

import pytest
import torch

from dataset import EvaluationDataset, Sample, find_dataset, list_samples
from evaluation.bands import Stored
from evaluation.inference import PredictionError
from evaluation.metrics import ConfusionMatrix
from evaluation.scores import count_predictions, validation_scores
from utils.distributed import Process

ALONE = Process((torch.device("cpu"),))


def scores_of(demo_data, until=iter):
    spec = find_dataset(demo_data)
    dataset = EvaluationDataset(list_samples(spec, demo_data, "val"), spec.labels)

    def predict(images, frame=None):
        return Stored(torch.ones(1, 19, *images.shape[2:]))

    return validation_scores(predict, dataset, ALONE, 0, until)


def test_an_evaluation_that_a_signal_cut_short_has_no_scores(demo_data):
    assert 0 < scores_of(demo_data)["pixel_accuracy"] < 1
    assert scores_of(demo_data, until=lambda samples: islice(samples, 2)) is None


def test_of_a_clip_the_scored_frame_counts():
    clip = Sample(torch.zeros(3, 3, 4, 5), torch.full((4, 5), 2, dtype=torch.uint8), "middle", scored=1)

    def predict(images, frame=None):
        logits = torch.zeros(1, 4, *images.shape[3:])
        logits[:, frame] = 1
        return Stored(logits)

    matrix = ConfusionMatrix(4)
    assert count_predictions(predict, [clip], matrix, ALONE) == 1
    assert matrix.counts[2].tolist() == [0, 20, 0, 0]  # the label's row, the prediction's column


def test_an_image_that_cannot_be_predicted_is_named():
    def predict(images, frame=None):
        raise PredictionError("the network's output is not finite")

    image = Sample(torch.zeros(3, 4, 5), None, "street")
    with pytest.raises(PredictionError, match=r"^street: the network's output is not finite"):
        count_predictions(predict, [image], ConfusionMatrix(4), ALONE)
