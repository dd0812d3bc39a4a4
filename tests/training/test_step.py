"""One step of training: precisions, parts of a batch, replicas on several devices."""

import time

import pytest
import torch
from torch import nn

import libs
from dataset import Batch
from libs import ABN, InPlaceABNSync
from networks.layers import SampleDropout2d
from training.criterion import build_criterion
from training.recipes import Recipe
from training.step import TrainingError, TrainStep, build_optimizer, complete_momentum, set_rates
from utils.distributed import Process

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
    return Batch(images, labels, torch.arange(count))


def make(norm=ABN, devices=(CPU,), between=None, **options):
    torch.manual_seed(0)
    network = Network(norm, between).double()
    optimizer = build_optimizer(network, 0.1, 0.9, 1e-2)
    criterion = build_criterion(ohem=True, ohem_thres=0.2, ohem_keep=6400)
    step = TrainStep(network, criterion, optimizer, Process(devices), **{"abort": libs.abort} | options)
    step.wrap_model()
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
        (losses, logits), (expected, other_logits) = step(batch()), whole(batch())
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
        return network.conv(batch().images[2:].contiguous(memory_format=torch.channels_last))


def test_a_replica_that_fails_ends_the_step_with_its_error(replicate):
    """At once, although the other waits for it in its normalisation."""
    _, step = make(InPlaceABNSync, (CPU, CPU), Fails("forward", features_of_the_last_two()))
    began = time.monotonic()
    with pytest.raises(ArithmeticError, match="out of luck"):
        step(batch())
    assert time.monotonic() - began < 5


def test_a_backward_pass_that_fails_calls_the_replicas_that_wait(replicate):
    called = []
    between = Fails("backward", features_of_the_last_two())
    network, step = make(InPlaceABNSync, (CPU, CPU), between, abort=lambda *call: called.append(call))
    libs.freeze(network)
    with pytest.raises(ArithmeticError, match="out of luck") as error:
        step(batch())
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
    step.wrap_model()
    single = batch()._replace(images=batch().images.float())
    first = [step(single)[0]["loss"] for _ in range(6)]
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
    step.wrap_model()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    step(batch()._replace(images=batch().images.float()))
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


class TwoRates(Network):
    """Its classifiers learn faster and do not decay."""

    def parameter_groups(self):
        fast = [*self.out.parameters(), *self.aux.parameters()]
        slow = [p for p in self.parameters() if not any(p is other for other in fast)]
        return [{"params": slow}, {"params": fast, "lr": 1.0, "weight_decay": 0.0}]


def test_each_parameter_group_keeps_its_rate_and_decay():
    optimizer = build_optimizer(TwoRates(ABN), 0.1, 0.9, 1e-2)
    recipe = Recipe(num_steps=10, learning_rate=0.1, power=1.0)
    for step, share in ((0, 1.0), (5, 0.5), (9, 0.1)):
        set_rates(optimizer, recipe, step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * share, share])
        assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_an_optimiser_without_momentum(tmp_path):
    """Of a user's own; the engine asks nothing that Adam has not."""
    torch.manual_seed(0)
    network = Network(nn.BatchNorm2d)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    complete_momentum(optimizer)
    step = TrainStep(network, build_criterion(), optimizer, Process((CPU,)))
    step.wrap_model()
    single = batch()._replace(images=batch().images.float())
    losses = [step(single)[0]["loss"] for _ in range(5)]
    assert losses[-1] < losses[0]


def test_no_memory_is_one_line(monkeypatch):
    _, step = make()
    monkeypatch.setattr(step, "_micro_batch", lambda *_: torch.empty(2**60))
    with pytest.raises(TrainingError, match="out of memory; lower --batch-size"):
        step(batch())
