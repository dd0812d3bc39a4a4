"""The augmentation against the reference's, written out step by step."""

import cv2
import numpy as np
import pytest

from dataset.transforms import MEAN_BGR, TrainTransform, denormalize, normalize


def sample(height=30, width=44):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 5, (height, width), np.uint8)


class Script:
    """Stands in for a generator: hands out the draws it was given."""

    def __init__(self, integers, random):
        self.draws, self.random_value, self.limits = list(integers), random, []

    def integers(self, low, high):
        self.limits.append((low, high))
        return self.draws.pop(0)

    def random(self):
        return self.random_value


def as_the_reference_does(image, label, factor, crop, top, left, mirror):
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    image = np.asarray(image, np.float32) - MEAN_BGR
    below, right = max(crop[0] - label.shape[0], 0), max(crop[1] - label.shape[1], 0)
    border = (0, below, 0, right, cv2.BORDER_CONSTANT)
    image = cv2.copyMakeBorder(image, *border, value=(0.0, 0.0, 0.0))
    label = cv2.copyMakeBorder(label, *border, value=(255,))
    image = image[top : top + crop[0], left : left + crop[1]].transpose(2, 0, 1)
    label = label[top : top + crop[0], left : left + crop[1]]
    return (image[:, :, ::-1], label[:, ::-1]) if mirror else (image, label)


@pytest.mark.parametrize(
    ("draw", "crop", "top", "left", "mirror"),
    [
        (0, (21, 31), 0, 0, False),  # 0.7: exactly the image's size
        (3, (21, 31), 9, 13, True),  # 1.0: its lowest right corner
        (14, (33, 35), 5, 11, True),  # 2.1
        (1, (40, 20), 0, 4, True),  # padded below only
        (0, (64, 64), 0, 0, False),  # padded on both sides
    ],
)
def test_equals_the_reference(draw, crop, top, left, mirror):
    image, label = sample()
    rng = Script([draw, top, left], 0.25 if mirror else 0.75)
    got_image, got_label = TrainTransform(crop)(image, label, rng)
    expected = as_the_reference_does(image, label, 0.7 + draw / 10, crop, top, left, mirror)
    np.testing.assert_array_equal(got_image, expected[0])
    np.testing.assert_array_equal(got_label, expected[1])
    assert got_image.dtype == np.float32
    assert got_label.dtype == np.uint8
    assert rng.limits[0] == (0, 15)  # 0.7 … 2.1 in fifteen steps


def test_draws_cover_the_whole_range():
    image, label = sample()
    rng = Script([3, 0, 0], 0.9)
    TrainTransform((21, 31))(image, label, rng)
    assert rng.limits[1:] == [(0, 10), (0, 14)]  # every offset at which the crop lies inside


def test_without_augmentation_only_crops():
    image, label = sample(20, 20)
    transform = TrainTransform((20, 20), scale=False, mirror=False)
    got_image, got_label = transform(image, label, np.random.default_rng(0))
    np.testing.assert_array_equal(got_image, normalize(image))
    np.testing.assert_array_equal(got_label, label)


def test_ignore_label_pads():
    image, label = sample(4, 4)
    transform = TrainTransform((6, 6), scale=False, mirror=False, ignore_label=99)
    _, got = transform(image, label, np.random.default_rng(0))
    assert (got[4:] == 99).all()
    assert (got[:, 4:] == 99).all()


def test_denormalize_gives_the_picture_back_in_rgb():
    image, _ = sample()
    np.testing.assert_array_equal(denormalize(normalize(image)), image[:, :, ::-1])
