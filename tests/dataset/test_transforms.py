"""The augmentation against the reference's, written out step by step."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from dataset import AffineTransform, Normalization, TrainTransform, short_side_size

MEAN_BGR = np.array((104.00698793, 116.66876762, 122.67891434), np.float32)


def sample(height=30, width=44):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 5, (height, width), np.uint8)


class Script:
    """Stands in for a generator: hands out the draws it was given."""

    def __init__(self, integers, *random, normal=()):
        self.draws, self.random_values, self.normal, self.limits = (
            list(integers),
            list(random),
            list(normal),
            [],
        )

    def integers(self, low, high):
        self.limits.append((low, high))
        return self.draws.pop(0)

    def random(self):
        return self.random_values.pop(0)

    def standard_normal(self):
        return self.normal.pop(0)


def as_the_reference_does(image, label, factor, crop, top, left, mirror):
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    label = cv2.resize(label, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    image = np.asarray(image[:, :, ::-1], np.float32) - MEAN_BGR
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
    np.testing.assert_array_equal(got_image, Normalization()(image))
    np.testing.assert_array_equal(got_label, label)


def test_ignore_label_pads():
    image, label = sample(4, 4)
    transform = TrainTransform((6, 6), scale=False, mirror=False, ignore_label=99)
    _, got = transform(image, label, np.random.default_rng(0))
    assert (got[4:] == 99).all()
    assert (got[:, 4:] == 99).all()


@pytest.mark.parametrize("order", ["BGR", "RGB"])
@pytest.mark.parametrize("std", [(1.0, 1.0, 1.0), (58.4, 57.1, 57.4)])
def test_normalization_and_back(order, std):
    image, _ = sample()
    mean = (10.5, 20.25, 30.125)
    normalization = Normalization(mean, std, order)
    normalized = normalization(image)
    ordered = image if order == "RGB" else image[:, :, ::-1]
    expected = (ordered.astype(np.float64) - mean) / std
    np.testing.assert_allclose(normalized.transpose(1, 2, 0), expected, rtol=1e-6, atol=1e-5)
    assert normalized.dtype == np.float32
    assert normalized.flags.c_contiguous
    np.testing.assert_array_equal(normalization.to_rgb(normalized), image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"channel_order": "GBR"}, "'GBR'"), ({"std": (1.0, 0.0, 1.0)}, "std must be positive")],
)
def test_bad_normalization(arguments, message):
    with pytest.raises(ValueError, match=message):
        Normalization(**arguments)


def test_mirroring_swaps_the_pairs_of_classes():
    image, label = sample(4, 4)
    transform = TrainTransform((4, 4), scale=False, mirror_pairs=((1, 2), (0, 4)))
    mirrored_image, mirrored = transform(image, label, Script([0, 0], 0.25))
    swap = {0: 4, 1: 2, 2: 1, 3: 3, 4: 0}
    assert mirrored.tolist() == [[swap[value] for value in row[::-1]] for row in label.tolist()]
    np.testing.assert_array_equal(mirrored_image, Normalization()(image[:, ::-1]))
    _, kept = transform(image, label, Script([0, 0], 0.75))
    np.testing.assert_array_equal(kept, label)


@pytest.mark.parametrize("transform", [TrainTransform, AffineTransform])
def test_a_mirrored_crop_of_one_pixel(transform):
    """PyTorch takes no negative strides."""
    mirrored = transform((1, 1), normalization=Normalization((9.0, 9.0, 9.0)))
    for seed in range(4):
        image, label = mirrored(*sample(), np.random.default_rng(seed))
        assert torch.from_numpy(image).shape == (3, 1, 1)
        assert torch.from_numpy(label).shape == (1, 1)


def test_scaled_sizes_are_those_that_opencv_gives():
    """The crop is drawn before the image is scaled."""
    line = np.zeros((1, 400), np.uint8)
    for draw in range(15):
        factor = 0.7 + draw / 10
        for width in range(1, 400):
            assert cv2.resize(line[:, :width], None, fx=factor, fy=1).shape[1] == round(width * factor)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((512, 683), 300, (300, 400)),
        ((683, 512), 600, (800, 600)),
        ((300, 900), 525, (333, 1000)),  # the longer side would be 1575
        ((1, 5000), 300, (1, 1000)),
    ],
)
def test_short_side_size(size, short_side, expected):
    assert short_side_size(*size, short_side) == expected


def test_short_sides_scale_then_crop_and_pad():
    image, label = sample(30, 44)
    rng = Script([2, 5, 0], 0.25)
    transform = TrainTransform(
        (40, 90), short_sides=(15, 30, 45), normalization=Normalization((0.0, 0.0, 0.0))
    )
    got_image, got_label = transform(image, label, rng)
    assert rng.limits == [(0, 3), (0, 45 - 40 + 1), (0, 1)]  # 45×66: cut in height, padded in width
    scaled = cv2.resize(image, (66, 45))[5:45, ::-1, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(got_image[:, :, 24:], scaled)
    assert (got_image[:, :, :24] == 0).all()
    scaled_label = cv2.resize(label, (66, 45), interpolation=cv2.INTER_NEAREST)[5:45, ::-1]
    np.testing.assert_array_equal(got_label, np.pad(scaled_label, ((0, 0), (24, 0)), constant_values=255))


AFFINE = AffineTransform((33, 33), normalization=Normalization((1.0, 2.0, 3.0), channel_order="RGB"))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarter_turns", [-2, -1, 0, 1, 2])
def test_affine_turns_the_whole_image(quarter_turns, mirrored):
    image, label = sample(33, 33)
    transform = replace(AFFINE, rotation=90.0, mirror_pairs=((1, 3),))
    rng = Script([], 0.5, 0.25 if mirrored else 0.75, normal=[0.0, quarter_turns])
    got_image, got_label = transform(image, label, rng)
    image, label = np.rot90(image, quarter_turns), np.rot90(label, quarter_turns)
    if mirrored:
        image, label = image[:, ::-1], np.choose(label[:, ::-1], [0, 3, 2, 1, 4])
    np.testing.assert_array_equal(got_label, label)
    np.testing.assert_allclose(got_image.transpose(1, 2, 0), image - np.float32([1, 2, 3]), atol=0.01)
    assert got_image.flags.c_contiguous
    assert got_label.flags.c_contiguous


def test_affine_fits_the_image_into_the_crop_and_pads():
    image, label = sample(11, 33)
    image, label = AffineTransform((33, 33), ignore_label=99)(
        image, label, Script([], 0.7, 0.9, normal=[0.0])
    )
    assert (label[:11] == 99).all()
    assert (label[22:] == 99).all()
    assert (label[11:22] == sample(11, 33)[1]).all()
    assert (image[:, :11] == 0).all()
    np.testing.assert_allclose(image[:, 11:22], Normalization()(sample(11, 33)[0]), atol=0.01)


@pytest.mark.parametrize(("normal", "share"), [(0.0, 1.0), (0.4, 1 / 1.1), (9.0, 1 / 1.25), (-9.0, 1 / 0.75)])
def test_affine_scale_is_limited_to_a_quarter(normal, share):
    label = np.zeros((200, 100), np.uint8)
    transform = AffineTransform((473, 473))
    image = np.zeros((200, 100, 3), np.uint8)
    _, label = transform(image, label, Script([], 0.7, 0.9, normal=[normal]))
    covered = (label == 0).any(axis=0).sum()
    assert covered == pytest.approx(473 / 2 * share, abs=2)


def test_affine_draws():
    """Between a shrunken and a turned image: σ and limits of the angle, how often an image is turned."""
    label = np.zeros((101, 101), np.uint8)
    label[:51, 50] = 1  # from the middle straight up
    image = np.zeros((101, 101, 3), np.uint8)
    angles = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        _, got = replace(AFFINE, crop_size=(101, 101), mirror=False)(image, label, rng)
        rows, columns = np.nonzero(got == 1)
        angles.append(np.degrees(np.arctan2(50 - columns[rows.argmin()], 50 - rows.min())))
    turned = np.abs(angles) > 1
    assert turned.mean() == pytest.approx(0.6, abs=0.08)
    assert np.std(np.array(angles)[turned]) == pytest.approx(27, abs=4)  # 30° limited to ±60°
    assert np.abs(angles).max() < 62


@pytest.mark.parametrize("transform", [TrainTransform((21, 31)), AFFINE])
def test_all_frames_of_a_clip_are_transformed_alike(transform):
    frames = [sample(30, 44), sample(30, 44)]
    frames[1] = (255 - frames[1][0], 4 - frames[1][1])
    images, labels = (np.stack(arrays) for arrays in zip(*frames, strict=True))
    got_images, got_labels = transform(images, labels, np.random.default_rng(3))
    assert got_images.shape[:2] == (3, 2)
    for index, frame in enumerate(frames):
        image, label = transform(*frame, np.random.default_rng(3))
        np.testing.assert_array_equal(got_images[:, index], image)
        np.testing.assert_array_equal(got_labels[index], label)
