"""The category consistent loss against its formula, written out class by class and pixel by pixel."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.training.threads import in_threads
from training.category_loss import category_consistent_loss, labels_at
from training.criterion import build_criterion


def sample(batch=2, channels=3, height=7, width=5, classes=4, seed=0, spread=1.5):
    """Embeddings of which some are near their mean, some far, some very far; fp64."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, classes, (batch, height, width), generator=generator)
    centres = torch.randn(classes, channels, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64)
    embedding = (centres[target] + spread * noise).permute(0, 3, 1, 2).contiguous()
    target[0, :2, :2] = 255
    return embedding.requires_grad_(), target


def formula(embedding, target, kind="piecewise"):
    """TPAMI 2020, section 3.4, in loops."""
    classes = sorted(set(target.flatten().tolist()) - {255})
    members = {c: [embedding[b, :, y, x] for b, y, x in (target == c).nonzero().tolist()] for c in classes}
    means = {c: torch.stack(members[c]).mean(0) for c in classes}

    def phi(d):
        if d <= 0.5:
            return 0 * d
        if kind == "quadratic" or d <= 1.5:
            return (d - 0.5) ** 2
        return d - 1.5 + 1.0

    var = sum(sum(phi((means[c] - h).norm()) for h in members[c]) / len(members[c]) for c in classes)
    var = var / len(classes)
    pairs = [(a, b) for a in classes for b in classes if a != b]
    dis = sum(F.relu(3.0 - (means[a] - means[b]).norm()) ** 2 for a, b in pairs) / max(len(pairs), 1)
    reg = sum(means[c].norm() for c in classes) / len(classes)
    return var + dis + 0.001 * reg


@pytest.mark.parametrize("kind", ["piecewise", "quadratic"])
@pytest.mark.parametrize("spread", [0.1, 0.6, 3.0])
def test_the_formula_and_its_gradient(kind, spread):
    embedding, target = sample(spread=spread)
    got, want = category_consistent_loss(embedding, target, 255, kind), formula(embedding, target, kind)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(x, embedding)[0] for x in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_all_branches_are_met_by_the_sample():
    embedding, target = sample()
    means = {c: embedding.permute(0, 2, 3, 1)[target == c].mean(0) for c in range(4)}
    distances = torch.cat(
        [(embedding.permute(0, 2, 3, 1)[target == c] - means[c]).norm(dim=1) for c in means]
    )
    assert (distances < 0.5).any()
    assert ((distances > 0.5) & (distances < 1.5)).any()
    assert (distances > 1.5).any()


def test_one_class_has_no_distance_to_others():
    embedding, target = sample()
    target = torch.where(target == 255, 255, 2)
    torch.testing.assert_close(category_consistent_loss(embedding, target), formula(embedding, target))


def test_a_batch_without_labels_gives_zero():
    embedding, target = sample()
    loss = category_consistent_loss(embedding, torch.full_like(target, 255))
    loss.backward()
    assert loss.item() == 0
    assert not embedding.grad.any()


def test_embeddings_that_coincide_have_finite_gradients():
    embedding = torch.ones(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.arange(16).view(1, 4, 4) % 3
    loss = category_consistent_loss(embedding, target)
    loss.backward()
    assert loss.item() == pytest.approx(9 + 0.001 * math.sqrt(3))
    assert embedding.grad.isfinite().all()


def test_larger_labels_are_read_where_the_positions_lie():
    target = torch.arange(9 * 17).view(1, 9, 17)
    assert labels_at(target, 3, 5)[0].tolist() == [[y * 17 + x for x in (0, 4, 8, 12, 16)] for y in (0, 4, 8)]
    assert labels_at(target[..., :6], 1, 3).tolist() == [[[0, 3, 5]]]  # between two the latter
    assert torch.equal(labels_at(target, 9, 17), target)
    assert labels_at(target, 1, 1).tolist() == [[[0]]]
    embedding, small = sample()
    large = F.interpolate(small[:, None].double(), (7 * 8 - 7, 5 * 8 - 7), mode="nearest-exact")[:, 0].long()
    assert torch.equal(labels_at(large, 7, 5), small)
    torch.testing.assert_close(category_consistent_loss(embedding, large), formula(embedding, small))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_fp32(dtype):
    embedding, target = sample()
    half = embedding.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = category_consistent_loss(half, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(formula(half.detach().double(), target).item(), rel=1e-5)
    loss.backward()
    assert half.grad.isfinite().all()


def with_logits(embedding, batch):
    return {"out": torch.zeros(batch, 4, *embedding.shape[2:], dtype=embedding.dtype), "embedding": embedding}


@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 3, 1)])
def test_parts_on_several_devices_are_one_batch(sizes):
    embedding, target = sample(batch=6)
    want = formula(embedding, target)
    (want_grad,) = torch.autograd.grad(want, embedding)
    criterion = build_criterion(ccl=True)
    parts = zip(embedding.split(sizes), target.split(sizes), strict=True)
    losses = criterion.batch_losses([(with_logits(e, len(e)), t) for e, t in parts])
    terms = losses["loss_ccl_var"] + losses["loss_ccl_dis"] + 0.001 * losses["loss_ccl_reg"]
    torch.testing.assert_close(terms, want.detach())
    torch.testing.assert_close(losses["loss"].detach(), want.detach() + losses["loss_head"])
    torch.testing.assert_close(torch.autograd.grad(losses["loss"], embedding)[0], want_grad)


@pytest.mark.parametrize("processes", [2, 3])
def test_parts_in_several_processes_are_one_batch(processes):
    """Although a class may be in one process only; averaging the gradients gives the batch's."""
    embedding, target = sample(batch=6)
    target[3:][target[3:] == 1] = 255
    want = formula(embedding, target)
    (want_grad,) = torch.autograd.grad(want, embedding)
    criterion = build_criterion(ccl=True)

    def run(process, part, labels):
        losses = criterion.batch_losses([(with_logits(part, len(part)), labels)], process)
        return losses, torch.autograd.grad(losses["loss"] - losses["loss_head"], part)[0]

    parts = [x.detach().requires_grad_() for x in embedding.chunk(processes)]
    results = in_threads(run, parts, target.chunk(processes))
    mean = sum(losses["loss"] - losses["loss_head"] for losses, _ in results) / processes
    torch.testing.assert_close(mean, want)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]) / processes, want_grad)


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind is one of piecewise, quadratic; got 'cubic'"):
        build_criterion(ccl=True, ccl_kind="cubic")


@pytest.mark.parametrize("label", [-1, 256])
def test_labels_that_are_no_train_ids_are_refused(label):
    with pytest.raises(ValueError, match=f"labels must be 0 … 255, or ignore_index; got {label}"):
        category_consistent_loss(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), label))
    assert category_consistent_loss(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), label), label) == 0
