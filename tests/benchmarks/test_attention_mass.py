"""The shares of attention, against sums position by position."""

import torch

from benchmarks.attention_mass import dense, evenly, over_rounds, own_class
from cc_attention import attention_weights
from evaluation.attention_page import attention_of

H, W = 3, 5


def rounds():
    torch.manual_seed(0)
    return [attention_weights(*torch.randn(2, 1, 4, H, W, dtype=torch.float64))[0] for _ in range(3)]


def test_products_are_the_attention_over_rounds():
    weights = rounds()
    matrices = over_rounds([dense(one) for one in weights])
    for y in range(H):
        for x in range(W):
            expected = attention_of(weights, y, x)
            for matrix, wanted in zip(matrices, expected, strict=True):
                torch.testing.assert_close(matrix[y * W + x].view(H, W), wanted)


def test_an_even_round_is_the_path():
    matrix = dense(evenly(rounds()[0]))
    for y in range(H):
        for x in range(W):
            path = torch.zeros(H, W, dtype=torch.float64)
            path[y], path[:, x] = 1, 1
            torch.testing.assert_close(matrix[y * W + x].view(H, W), path / (H + W - 1))


def test_own_class():
    attention = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.0, 1.0], [0.1, 0.3, 0.6]], dtype=torch.float64)
    classes, known = torch.tensor([2, 9, 2]), torch.tensor([True, False, True])
    torch.testing.assert_close(own_class(attention, classes, known), torch.ones(2, dtype=torch.float64))
    everything = torch.ones(3, dtype=torch.bool)
    expected = torch.tensor([0.75, 0.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(own_class(attention, classes, everything), expected)
