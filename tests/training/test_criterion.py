"""The losses against numpy and scipy, which the reference uses for its OHEM."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch.nn import functional as F

from tests.training.threads import in_threads
from training.criterion import _Pixels, _UpSample, build_criterion, ohem_threshold


def sample(batch=2, classes=5, height=45, width=61, ignored=0.2, sharpness=2.0, seed=0):
    """Logits at 1/8 and at full size, labels with ignored pixels in blobs, fp64."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(batch, classes, -(-height // 8), -(-width // 8), generator=generator).double()
    small = (small * sharpness).requires_grad_()
    coarse = torch.randint(0, classes, (batch, 1, 6, 7), generator=generator).double()
    target = F.interpolate(coarse, (height, width), mode="nearest")[:, 0].long()
    blobs = F.interpolate(torch.rand(batch, 1, 7, 9, generator=generator), (height, width))[:, 0]
    target[blobs < ignored] = 255
    return small, target


def upsample(logits, target):
    return F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=True)


def threshold_of(small, target, thres, keep):
    return ohem_threshold(_Pixels(small.detach(), target, 255, True).on_grid(), thres, keep)


def reference_threshold(probabilities, labels, thres, keep, mode="constant"):
    """The reference's rule in numpy and scipy, on (B,C,H,W) and (B,H,W)."""
    zoom = (1.0, 1.0, 1 / 8, 1 / 8)
    probabilities = scipy.ndimage.zoom(probabilities, zoom, order=1, mode=mode)
    labels = scipy.ndimage.zoom(labels, zoom[1:], order=0, mode=mode)
    true_class = [
        probabilities[b, labels[b, y, x], y, x]
        for b, y, x in np.ndindex(labels.shape)
        if labels[b, y, x] != 255
    ]
    k = keep // 64
    if k >= len(true_class):
        return 1.0
    return thres if k == 0 else max(thres, np.sort(true_class)[k - 1])


def reference_loss(logits, target, threshold):
    """Mean cross entropy of the pixels that stay, pixel by pixel."""
    probabilities = logits.softmax(1).detach().numpy()
    kept = [
        probabilities[b, target[b, y, x], y, x]
        for b, y, x in np.ndindex(*target.shape)
        if target[b, y, x] != 255 and probabilities[b, target[b, y, x], y, x] <= threshold
    ]
    return -np.log(kept).mean() if kept else 0.0


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("small", "large"),
    [((5, 7), (17, 20)), ((1, 4), (1, 9)), ((4, 1), (9, 5)), ((6, 6), (3, 4)), ((3, 3), (1, 1))],
)
def test_gradient_of_the_up_sampling(small, large, align_corners):
    x = torch.randn(2, 3, *small, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, *large, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(y, x, grad)[0]
        for y in (
            _UpSample.apply(x, large, align_corners),
            F.interpolate(x, large, mode="bilinear", align_corners=align_corners),
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_logits_are_enlarged_as_the_network_says():
    small, target = sample(height=45, width=61)
    criterion = build_criterion(align_corners=False, aux_weight=0.5)
    loss = criterion({"out": small, "aux": 2 * small}, target)["loss"]
    large = F.interpolate(small, (45, 61), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large, target, ignore_index=255)
    expected = expected + 0.5 * F.cross_entropy(2 * large, target, ignore_index=255)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("height", "width"), [(45, 61), (97, 33), (9, 130), (3, 5), (8, 8), (12, 20)])
@pytest.mark.parametrize("keep", [0, 63, 640, 1920, 10**6])
def test_ohem_is_the_references_rule(height, width, keep):
    small, target = sample(height=height, width=width)
    logits = upsample(small, target)
    probabilities = logits.softmax(1).detach().numpy()
    expected = reference_threshold(probabilities, target.numpy(), 0.05, keep)
    threshold = threshold_of(small, target, 0.05, keep)
    assert float(threshold) == pytest.approx(expected, rel=1e-12)
    loss = build_criterion(ohem=True, ohem_thres=0.05, ohem_keep=keep)({"out": small}, target)["loss"]
    assert loss.item() == pytest.approx(reference_loss(logits, target, expected), rel=1e-10)


def test_ohem_threshold_comes_from_all_three_branches():
    """Otherwise the comparison above could pass without ever sorting anything."""
    small, target = sample()
    few, some, many = (float(threshold_of(small, target, 0.05, keep)) for keep in (64, 1920, 10**6))
    assert few == pytest.approx(0.05)
    assert 0.06 < some < 1
    assert many == 1.0


def test_the_grid_is_scipys_up_to_its_last_pixel():
    """For one size in eleven scipy rounds its last point out of the image and reads 0; we do not."""
    small, target = sample(height=109, width=115)
    logits = upsample(small, target).detach()
    probabilities, labels = logits.softmax(1).numpy(), target.numpy()
    threshold = float(threshold_of(small, target, 0.3, 6400))
    assert threshold == pytest.approx(
        reference_threshold(probabilities, labels, 0.3, 6400, "nearest"), rel=1e-12
    )
    column = np.arange(769.0) + 1  # the published crop is not one of those sizes
    assert scipy.ndimage.zoom(column, 1 / 8, order=0)[-1] == 769


@pytest.mark.parametrize("ohem", [False, True])
def test_an_ignored_crop_gives_zero_loss_and_zero_gradients(ohem):
    small, target = sample()
    target[:] = 255
    aux = small.detach().clone().requires_grad_()
    losses = build_criterion(ohem=ohem)({"out": small, "aux": aux}, target)
    losses["loss"].backward()
    assert losses["loss"].item() == losses["kept_pixels"].item() == 0
    assert torch.equal(small.grad, torch.zeros_like(small))
    assert torch.equal(aux.grad, torch.zeros_like(aux))


def test_ohem_keeps_nothing_where_all_is_easy():
    target = torch.zeros(1, 16, 16, dtype=torch.long)
    logits = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    logits[:, 0] = 20.0
    logits.requires_grad_()
    loss = build_criterion(ohem=True, ohem_keep=0)({"out": logits}, target)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_plain_loss_with_auxiliary_head():
    small, target = sample()
    aux, _ = sample(seed=1)
    loss = build_criterion(aux_weight=0.4)({"out": small, "aux": aux}, target.to(torch.uint8))["loss"]
    expected = F.cross_entropy(upsample(small, target), target, ignore_index=255)
    expected = expected + 0.4 * F.cross_entropy(upsample(aux, target), target, ignore_index=255)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, (small, aux)), torch.autograd.grad(expected, (small, aux)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_auxiliary_head_is_not_mined():
    small, target = sample()
    with_aux = build_criterion(ohem=True, ohem_thres=0.3, ohem_keep=0)({"out": small, "aux": small}, target)[
        "loss"
    ]
    without = build_criterion(ohem=True, ohem_thres=0.3, ohem_keep=0)({"out": small}, target)["loss"]
    plain = F.cross_entropy(upsample(small, target), target, ignore_index=255)
    torch.testing.assert_close(with_aux, without + 0.4 * plain)


def test_half_logits_train():
    small, target = sample(height=65, width=65)
    half = small.detach().bfloat16().requires_grad_()
    loss = build_criterion(ohem=True, ohem_keep=640)({"out": half}, target)["loss"]
    loss.backward()
    assert half.grad.isfinite().all()
    wide = build_criterion(ohem=True, ohem_keep=640)({"out": half.detach().double()}, target)["loss"]
    assert loss.item() == pytest.approx(wide.item(), rel=0.02)


@pytest.mark.parametrize(("ohem", "keep"), [(False, 0), (True, 0), (True, 1920), (True, 10**6)])
@pytest.mark.parametrize("sizes", [(4,), (1, 3), (2, 1, 1)])
def test_parts_on_several_devices_are_one_batch(ohem, keep, sizes):
    small, target = sample(batch=4)
    aux, _ = sample(batch=4, seed=1)
    target[3] = 255  # a part may be all ignored
    criterion = build_criterion(ohem, 0.05, keep)
    whole = criterion({"out": small, "aux": aux}, target)["loss"]
    want = torch.autograd.grad(whole, (small, aux))
    outputs = zip(small.split(sizes), aux.split(sizes), target.split(sizes), strict=True)
    losses = criterion.batch_losses([({"out": out, "aux": a}, labels) for out, a, labels in outputs])
    torch.testing.assert_close(losses["loss"], whole)
    torch.testing.assert_close(losses["loss_head"] + 0.4 * losses["loss_aux"], whole.detach())
    for got, expected in zip(torch.autograd.grad(losses["loss"], (small, aux)), want, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("ohem", "keep"), [(False, 0), (True, 0), (True, 1920), (True, 10**6)])
@pytest.mark.parametrize("processes", [2, 4])
def test_parts_in_several_processes_are_one_batch(ohem, keep, processes):
    """Averaging the processes' gradients gives the batch's."""
    small, target = sample(batch=4)
    target[0] = 255
    criterion = build_criterion(ohem, 0.05, keep)
    whole = criterion.batch_losses([({"out": small}, target)])
    (want,) = torch.autograd.grad(whole["loss"], small)

    def run(process, logits, labels):
        losses = criterion.batch_losses([({"out": logits}, labels)], process)
        return losses, torch.autograd.grad(losses["loss"], logits)[0]

    parts = [x.detach().requires_grad_() for x in small.chunk(processes)]
    results = in_threads(run, parts, target.chunk(processes))
    for name, expected in whole.items():
        mean = sum(losses[name] for losses, _ in results) / processes
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]) / processes, want)


def test_the_share_of_kept_pixels():
    small, target = sample()
    logits = upsample(small, target)
    probabilities = logits.softmax(1).detach().numpy()
    labelled = [p for p in np.ndindex(*target.shape) if target[p] != 255]
    hard = sum(probabilities[b, target[b, y, x], y, x] <= 0.3 for b, y, x in labelled)
    losses = build_criterion(ohem=True, ohem_thres=0.3, ohem_keep=0).batch_losses([({"out": small}, target)])
    assert losses["kept_pixels"].item() == pytest.approx(hard / len(labelled))
    assert build_criterion().batch_losses([({"out": small}, target)])["kept_pixels"].item() == 1


@pytest.mark.parametrize("keep", [0, 640])
def test_mining_does_not_hide_what_is_not_a_number(keep):
    small, target = sample()
    broken = small.detach().clone()
    broken[0, 0, 0, 0] = float("nan")
    assert build_criterion(ohem=True, ohem_keep=keep)({"out": broken}, target)["loss"].isnan()


def test_all_pixels_are_hard_if_there_are_no_more_labels_than_are_kept():
    grid = torch.tensor([0.1, 0.3, 0.5, *[2.0] * 7])
    assert ohem_threshold(grid, 0.2, 3 * 64) == 1
    assert ohem_threshold(grid, 0.2, 2 * 64) == pytest.approx(0.3)


def test_pixels_that_are_certain_count_where_all_are_kept():
    """A threshold of 1 leaves a probability that is exactly 1 in fp32."""
    target = torch.randint(0, 3, (1, 16, 16))
    logits = 200 * F.one_hot(target, 3).permute(0, 3, 1, 2).float()
    losses = build_criterion(ohem=True, ohem_keep=10**6)({"out": logits, "aux": logits}, target)
    assert losses["kept_pixels"] == 1


def test_the_loss_under_functions_of_torch_func():
    small, target = sample(batch=1)
    criterion = build_criterion(aux_weight=0.0)

    def loss(logits):
        return criterion({"out": logits, "aux": logits}, target)["loss"]

    (want,) = torch.autograd.grad(loss(small), small)
    torch.testing.assert_close(torch.func.grad(loss)(small.detach()), want)
    several = torch.func.vmap(torch.func.grad(loss))(torch.stack([small.detach()] * 2))
    torch.testing.assert_close(several[1], want)


def test_gradients_within_autocast_are_those_outside():
    small, target = sample()
    small = small.detach().float().requires_grad_()
    loss = build_criterion()({"out": small, "aux": small}, target)["loss"]
    (want,) = torch.autograd.grad(loss, small, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(loss, small)
    assert torch.equal(got, want)
