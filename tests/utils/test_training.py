"""One step of training: precisions, parts of a batch, replicas on several devices."""

import time

import pytest
import torch
from torch import nn

import libs
from libs import ABN, InPlaceABNSync
from networks.dropout import SampleDropout2d
from utils.criterion import Losses, build_criterion
from utils.distributed import Process
from utils.training import LossWindow, TrainingError, TrainStep, build_optimizer, complete_momentum

CPU = torch.device("cpu")


class Network(nn.Module):
    """Two heads, normalisation, dropout that goes by keys."""

    def __init__(self, norm, between=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.between = between or nn.Identity()
        self.dropout = SampleDropout2d(0.3)
        self.out, self.aux = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images, keys):
        x = self.dropout(self.norm(self.between(self.conv(images))), keys)
        return {"out": self.out(x), "aux": self.aux(x)}


def batch(count=4):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (count, 41, 49), generator=generator)
    labels[0, :20] = 255
    return images, labels, torch.arange(count)


def make(norm=ABN, devices=(CPU,), between=None, **options):
    torch.manual_seed(0)
    network = Network(norm, between).double()
    optimizer = build_optimizer(network, 0.1, 0.9, 1e-2)
    criterion = build_criterion(ohem=True, ohem_thres=0.2, ohem_keep=6400)
    step = TrainStep(network, criterion, optimizer, Process(devices), **{"abort": libs.abort} | options)
    step.start()
    return network, step


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_several_devices_are_one(replicate, count, accumulate):
    """On the CPU one thread does all of a backward pass, so replicas cannot wait for each other there.

    That they share statistics then is tested in tests/libs; here their normalisation is frozen.
    """
    network, step = make(InPlaceABNSync, (CPU,) * count, accumulate=accumulate)
    other, whole = make(ABN, accumulate=accumulate)
    libs.freeze(network)
    libs.freeze(other)
    for _ in range(3):
        (losses, logits), (expected, other_logits) = step(*batch()), whole(*batch())
        torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(logits, other_logits[: len(logits)], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(step.gradient_norm(), whole.gradient_norm(), rtol=1e-10, atol=1e-12)
    for got, want in zip(network.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class Fails(nn.Module):
    """Raises for the part of the batch whose first features are given, forward or backward."""

    def __init__(self, when, features):
        super().__init__()
        self.when, self.features = when, features

    def forward(self, x):
        if torch.equal(x.detach(), self.features):
            if self.when == "forward":
                raise ArithmeticError("out of luck")
            x.register_hook(self.fail)
        return x

    def fail(self, grad):
        raise ArithmeticError("out of luck")


def features_of_the_last_two():
    network, _ = make()
    with torch.no_grad():
        return network.conv(batch()[0][2:].contiguous(memory_format=torch.channels_last))


def test_a_replica_that_fails_ends_the_step_with_its_error(replicate):
    """At once, although the other waits for it in its normalisation."""
    _, step = make(InPlaceABNSync, (CPU, CPU), Fails("forward", features_of_the_last_two()))
    began = time.monotonic()
    with pytest.raises(ArithmeticError, match="out of luck"):
        step(*batch())
    assert time.monotonic() - began < 5


def test_a_backward_pass_that_fails_calls_the_replicas_that_wait(replicate):
    called = []
    between = Fails("backward", features_of_the_last_two())
    network, step = make(InPlaceABNSync, (CPU, CPU), between, abort=lambda *call: called.append(call))
    libs.freeze(network)
    with pytest.raises(ArithmeticError, match="out of luck") as error:
        step(*batch())
    assert len({replica for replica, _ in called}) == 2
    assert all(cause is error.value for _, cause in called)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_types_compute_in_half_and_train_in_float(amp):
    torch.manual_seed(0)
    seen = []
    network = Network(ABN)
    network.out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    step = TrainStep(
        network, build_criterion(), build_optimizer(network, 0.1, 0.9, 0.0), Process((CPU,)), amp
    )
    step.start()
    images, labels, keys = batch()
    first = [step(images.float(), labels, keys)[0].total for _ in range(6)]
    assert set(seen) == {{"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in network.parameters())
    assert first[0].dtype == torch.float32
    assert first[-1] < first[0]


def test_an_overflow_in_the_first_step_is_skipped_without_trace():
    """Where PyTorch's fused SGD would leave its momentum uninitialised."""
    network = Network(ABN)
    before = {name: value.clone() for name, value in network.named_parameters()}
    step = TrainStep(
        network, build_criterion(), build_optimizer(network, 0.1, 0.9, 0.0), Process((CPU,)), "fp16"
    )
    step.start()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    images, labels, keys = batch()
    step(images.float(), labels, keys)
    assert step.scaler.get_scale() == 2.0**39
    assert not step.gradient_norm().isfinite()
    for name, value in network.named_parameters():
        assert torch.equal(value, before[name])
        assert not step.optimizer.state[value]["momentum_buffer"].any()


def test_parameters_that_were_frozen_get_a_momentum():
    """Resuming with another set of trained parameters, which PyTorch's fused SGD would refuse."""
    network = Network(ABN)
    libs.freeze(network)
    saved = build_optimizer(network, 0.1, 0.9, 0.0).state_dict()
    network = Network(ABN)
    optimizer = build_optimizer(network, 0.1, 0.9, 0.0)
    optimizer.load_state_dict(saved)
    complete_momentum(optimizer)
    assert all(optimizer.state[p]["momentum_buffer"] is not None for p in network.parameters())
    optimizer = build_optimizer(network, 0.1, 0.0, 0.0)
    assert not any("momentum_buffer" in optimizer.state[p] for p in network.parameters())


def losses(total):
    return Losses(*(torch.tensor(float(x)) for x in (total, total - 1, 2.5, 0.5)))


def test_a_window_of_losses():
    window = LossWindow(Process((CPU,)), batch_size=3)
    for total in (4, 6):
        window.begin()
        time.sleep(0.02)
        window.end(losses(total))
    time.sleep(0.2)  # not a part of any step
    values = window.read(12)
    speed = values.pop("images_per_second")
    assert values == {"loss": 5, "loss_head": 4, "loss_aux": 2.5, "kept_pixels": 0.5}
    assert 20 < speed < 150
    window.end(losses(7))
    assert window.read(13)["loss"] == 7


@pytest.mark.parametrize(("totals", "step"), [((1, float("nan"), 3), 11), ((1, 2, float("inf")), 12)])
def test_the_step_of_a_loss_that_is_not_finite_is_told(totals, step):
    window = LossWindow(Process((CPU,)), 1)
    for total in totals:
        window.end(losses(total))
    with pytest.raises(
        TrainingError, match=f"step {step}: the loss is (nan|inf); earlier checkpoints are kept"
    ):
        window.read(12)
