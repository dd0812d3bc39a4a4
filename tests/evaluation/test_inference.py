"""Sliding windows, scales and flips against the protocol written out, with networks whose answer is known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from evaluation import bands
from evaluation.bands import Stored
from evaluation.inference import PredictionError, multi_scale, short_sides, sliding, whole
from tests.evaluation import written_out


class Local(nn.Module):
    """Logits at 1/8 from a strided convolution, so that tiles and their borders matter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 9, stride=8, padding=4).double()
        self.batches = []

    def forward(self, images):
        self.batches.append(tuple(images.shape))
        return {"out": self.conv(images)}


def full(logits):
    """All rows of a map, asked for in one piece."""
    return logits.rows(0, logits.size[0])


def identity(images, frame=None):
    """A prediction that is the image itself."""
    return Stored(images)


@pytest.mark.parametrize(("height", "width"), [(40, 61), (33, 33), (20, 70), (20, 25), (77, 34), (56, 56)])
@pytest.mark.parametrize("tile_batch", [1, 3, 100])
def test_sliding_window(height, width, tile_batch):
    model, images = Local(), torch.randn(2, 3, height, width, dtype=torch.float64)
    with torch.no_grad():
        logits = full(sliding(model, (33, 33), tile_batch)(images))
        torch.testing.assert_close(
            logits, written_out.in_tiles(model, images, (33, 33)), rtol=1e-5, atol=1e-6
        )
    assert max(shape[0] for shape in model.batches) <= max(tile_batch, 2)  # a tile of each image at least


def test_published_tiles_of_a_cityscapes_image():
    model = Local().float()
    with torch.no_grad():
        sliding(model, (769, 769), tile_batch=8)(torch.zeros(1, 3, 1024, 2048))
    assert model.batches == [(8, 3, 769, 769)]  # 2 × 4 tiles, all in one batch


def test_tiles_need_not_be_square():
    model, image = Local(), torch.randn(1, 3, 30, 90, dtype=torch.float64)
    with torch.no_grad():
        logits = full(sliding(model, (17, 41))(image))
        torch.testing.assert_close(logits, written_out.in_tiles(model, image, (17, 41)), rtol=1e-5, atol=1e-6)
        small = image[..., :10, :30]
        padded = F.pad(small, (0, 11, 0, 7))  # to a tile's size
        expected = full(whole(model)(padded))[..., :10, :30]
        torch.testing.assert_close(full(sliding(model, (17, 41))(small)), expected)
    assert {shape[2:] for shape in model.batches} == {(17, 41)}


def test_whole_image():
    model, image = Local(), torch.randn(2, 3, 21, 34, dtype=torch.float64)
    expected = written_out.at_full_size(model, image)
    torch.testing.assert_close(full(whole(model)(image)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [whole, lambda model: sliding(model, (17, 33))], ids=["whole", "sliding"])
def test_bands_of_all_views(how):
    """Tiles, scales, mirroring and pairs of classes at once; rows are asked for a few at a time."""
    model, images = Local(), torch.randn(2, 3, 39, 50, dtype=torch.float64)

    def predict(view):
        return (
            written_out.at_full_size(model, view)
            if how is whole
            else written_out.in_tiles(model, view, (17, 33))
        )

    with torch.no_grad():
        logits = multi_scale(how(model), (0.6, 1, 1.3), flip=True, mirror_pairs=[(0, 2)])(images)
        got = torch.cat([logits.rows(top, min(top + 7, 39)) for top in range(0, 39, 7)], dim=2)
        expected = written_out.averaged(predict, images, (0.6, 1, 1.3), flip=True, swapped=[(0, 2)])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_scales_and_flip_are_averaged_in_the_images_own_frame():
    """A prediction that is the image itself must come back as itself, flipped or not, at every scale."""
    ramp = torch.linspace(0, 1, 24).view(1, 1, 1, 24) + torch.linspace(0, 2, 17).view(1, 1, 17, 1)
    image = ramp.expand(2, 3, 17, 24) * torch.tensor([1.0, -2.0]).view(2, 1, 1, 1)
    predict = multi_scale(identity, scales=(0.5, 1, 1.25), flip=True)
    torch.testing.assert_close(full(predict(image)), image, rtol=1e-5, atol=1e-5)


def test_flip_mirrors_left_and_right():
    seen = []

    def predict(images, frame=None):
        seen.append(images)
        return Stored(images)

    image = torch.randn(1, 3, 4, 6)
    multi_scale(predict, flip=True)(image)
    assert torch.equal(seen[1], image[:, :, :, torch.arange(5, -1, -1)])


def test_one_scale_without_flip_changes_nothing():
    model, image = Local(), torch.randn(1, 3, 21, 34, dtype=torch.float64)
    assert torch.equal(full(multi_scale(whole(model))(image)), full(whole(model)(image)))


class Clips(nn.Module):
    """Logits of each frame, folded into the batch as the segmenter does; frames differ by a sum over time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.image = Local()

    def forward(self, images):
        if images.dim() == 4:
            return self.image(images)
        folded = images.transpose(1, 2).flatten(0, 1)
        total = images.sum(2, keepdim=True).expand_as(images).transpose(1, 2).flatten(0, 1)
        return {"out": self.image(folded)["out"] + self.image(total)["out"]}


@pytest.mark.parametrize("frame", [0, 2])
@pytest.mark.parametrize("protocol", ["whole", "sliding", "multi_scale"])
def test_one_frame_of_a_clip(protocol, frame):
    """The prediction of a clip's frame is that of the sum of two images, each predicted alone."""
    model, clip = Clips(), torch.randn(2, 3, 3, 41, 50, dtype=torch.float64)

    def predicted(images, frame=None):
        predict = whole(model) if protocol != "sliding" else sliding(model, (33, 33), 2)
        if protocol == "multi_scale":
            predict = multi_scale(predict, (0.75, 1), flip=True)
        return full(predict(images, frame))

    with torch.no_grad():
        expected = predicted(clip[:, :, frame]) + predicted(clip.sum(2))
        torch.testing.assert_close(predicted(clip, frame), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(predicted(clip)[frame::3], expected, rtol=1e-4, atol=1e-4)


def test_mirroring_swaps_the_classes_of_a_pair():
    """A network that tells left from right (class 1 and 2) is averaged with itself."""

    def predict(images, frame=None):
        logits = torch.zeros(1, 4, *images.shape[2:])
        middle = images.shape[3] // 2
        logits[:, 1, :, :middle], logits[:, 2, :, middle:] = 1, 1
        logits[:, 3] = images[:, 0]
        return Stored(logits)

    images = torch.randn(1, 3, 5, 8)
    averaged = full(multi_scale(predict, flip=True, mirror_pairs=[(1, 2)])(images))
    torch.testing.assert_close(averaged, full(predict(images)))
    mixed = full(multi_scale(predict, flip=True)(images))
    assert mixed[0, 1].unique().tolist() == [0.5]


def test_short_sides_of_ade20k():
    sizes = []

    def predict(images, frame=None):
        sizes.append(tuple(images.shape[2:]))
        return Stored(images[:, :2])

    out = full(short_sides(predict, (30, 600))(torch.randn(1, 3, 40, 80)))
    assert sizes == [(30, 60), (500, 1000)]
    assert out.shape == (1, 2, 40, 80)


@pytest.mark.parametrize(
    ("size", "fit", "scales", "expected"),
    [  # into the crop, as in training on LIP
        ((100, 60), (473, 473), (1.0,), [(473, 284)]),
        ((60, 100), (473, 473), (1.0,), [(284, 473)]),
        ((946, 473), (473, 473), (1.0, 0.5), [(473, 236), (236, 118)]),
        ((1, 2000), (473, 473), (1.0,), [(1, 473)]),
        # to a short side
        ((100, 60), 30, (1.0,), [(50, 30)]),
        ((360, 480), 180, (1.0, 0.5), [(180, 240), (90, 120)]),
        ((60, 300), 450, (1.0,), [(200, 1000)]),  # as --short-sides bounds the long one
    ],
)
def test_images_are_scaled_before_they_are_predicted(size, fit, scales, expected):
    sizes = []

    def predict(images, frame=None):
        sizes.append(tuple(images.shape[2:]))
        return Stored(images[:, :2])

    images = torch.randn(1, 3, *size)
    out = full(multi_scale(predict, scales, fit=fit)(images))
    assert sizes == expected
    assert out.shape == (1, 2, *size)


def test_only_small_logits_are_held(monkeypatch):
    """However many scales there are: the network's outputs, and a band."""
    monkeypatch.setattr(bands, "BAND_BYTES", 4 * 4 * 48 * 5)
    heights, resize = [], F.interpolate

    def recorded(x, size, **how):
        heights.append(size[0])
        return resize(x, size, **how)

    monkeypatch.setattr(bands.F, "interpolate", recorded)
    predict = multi_scale(whole(Local().float()), (0.5, 0.75, 1.25, 1.5), flip=True)
    with torch.no_grad():
        logits = predict(torch.randn(1, 3, 40, 48))
        heights.clear()
        assert bands.class_ids(logits).shape == (1, 40, 48)
    assert max(heights) <= 9  # 5 rows of the image at a scale of 1.5, and one more


@pytest.mark.parametrize(("width", "half"), [(16, False), (17, True)])
@pytest.mark.parametrize("how", [whole, lambda model, amp: sliding(model, (20, 16), amp=amp)])
def test_narrow_inputs_are_in_full_precision_on_a_cpu(width, half, how):
    seen = []

    class Network(nn.Module):
        def forward(self, images):
            seen.append((images.shape[-1], torch.is_autocast_enabled("cpu")))
            return {"out": images}

    how(Network(), amp="bf16")(torch.zeros(1, 3, 20, width))
    assert set(seen) == {(width, half) if how is whole else (16, False)}


@pytest.mark.parametrize("is_fast", [True, False])
def test_bf16_where_it_is_fast(monkeypatch, is_fast):
    monkeypatch.setattr("evaluation.inference._is_fast_in_bf16", lambda device: is_fast)
    seen = []

    class Network(nn.Module):
        def forward(self, images):
            seen.append(torch.is_autocast_enabled("cpu"))
            return {"out": images}

    whole(Network(), "auto")(torch.zeros(1, 3, 20, 20))
    assert seen == [is_fast]


def test_large_logits_are_finite():
    """Their sum is not, in fp32."""

    class Network(nn.Module):
        def forward(self, images):
            return {"out": images}

    images = torch.full((1, 2, 9, 9), 3e38)
    assert torch.equal(full(whole(Network())(images)), images)


def test_a_frame_that_a_clip_does_not_have():
    with torch.no_grad(), pytest.raises(IndexError):
        whole(Clips())(torch.zeros(1, 3, 2, 20, 20, dtype=torch.float64), 2)


def test_what_overflows_in_fp16():
    model, images = Local().float(), torch.full((1, 3, 20, 20), 1e6)
    with torch.no_grad():
        assert full(whole(model)(images)).isfinite().all()
        with pytest.raises(PredictionError, match=r"damaged, or fp16 is too narrow for it \(bf16 is not\)"):
            whole(model, "fp16")(images)


@pytest.mark.parametrize("how", [whole, lambda model: sliding(model, (33, 33))])
def test_logits_that_are_not_finite(how):
    model = Local()
    model.conv.bias.data[0] = float("inf")
    with torch.no_grad(), pytest.raises(PredictionError, match="not finite"):
        how(model)(torch.randn(1, 3, 40, 40, dtype=torch.float64))
