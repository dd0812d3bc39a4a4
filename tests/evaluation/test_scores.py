"""Scores during training."""

from itertools import islice

import torch

from dataset import EvaluationDataset, find_dataset, list_samples
from evaluation.bands import Stored
from evaluation.scores import validation_scores
from utils.distributed import Process


def scores_of(demo_data, until=iter):
    spec = find_dataset(demo_data)
    dataset = EvaluationDataset(list_samples(spec, demo_data, "val"), spec.labels)

    def predict(images, frame=None):
        return Stored(torch.ones(1, 19, *images.shape[2:]))

    return validation_scores(predict, dataset, Process((torch.device("cpu"),)), 0, until)


def test_an_evaluation_that_a_signal_cut_short_has_no_scores(demo_data):
    assert 0 < scores_of(demo_data)["pixel_accuracy"] < 1
    assert scores_of(demo_data, until=lambda samples: islice(samples, 2)) is None
