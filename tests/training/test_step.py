"""One step of training: precisions, parts of a batch, replicas on several devices."""

import os
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

import libs
from dataset import Batch
from libs import ABN, InPlaceABN, InPlaceABNSync
from networks.config import NetworkConfig
from networks.layers import SampleDropout2d
from tests.scripts.processes import CONTEXT
from training.criterion import build_criterion
from training.recipes import Recipe
from training.schedule import SCHEDULES
from training.step import (
    TrainingError,
    TrainStep,
    build_optimizer,
    build_step,
    complete_momentum,
    give_gradients_the_strides_of_parameters,
    set_rates,
)
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


@pytest.fixture
def made(replicate, monkeypatch):
    """Lets ``Replicas`` run on the CPU; the replicas of each time that they are made."""
    made = []

    class Broadcast:
        @staticmethod
        def apply(devices, *tensors):
            return [tensor.clone() for _ in devices for tensor in tensors]

    def counted(network, devices):
        made.append(replicate(network, len(devices)))
        return made[-1]

    monkeypatch.setattr("training.replicas.Broadcast", Broadcast)
    monkeypatch.setattr("training.replicas.replicate", counted)
    return made


@pytest.mark.parametrize(("count", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_several_devices_are_one(made, count, accumulate):
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
    assert len(made) == 1
    replicas = made[0]
    assert all(replica.conv.weight is None for replica in replicas)  # their memory is free between steps


def test_replicas_are_made_again_when_the_network_has_changed(made):
    """Otherwise a replica would go on with what it was made of."""
    network, step = make(ABN, (CPU, CPU))
    other, whole = make(ABN, (CPU, CPU))

    def replaced(network):
        network.out = nn.Conv2d(8, 4, 1, bias=False, dtype=torch.float64)
        nn.init.ones_(network.out.weight)

    changes = [
        lambda network: None,
        libs.freeze,
        lambda network: setattr(network.dropout, "p", 0.9),
        lambda network: network.norm.running_mean.fill_(0.5),
        lambda network: setattr(network.norm, "running_var", torch.full((8,), 2.0, dtype=torch.float64)),
        replaced,
        lambda network: None,
    ]
    counts = []
    for change in changes:
        change(network)
        change(other)
        whole.wrap_model()  # makes new ones each time
        got, want = step(batch()), whole(batch())
        assert torch.equal(got[0]["loss"], want[0]["loss"])
        counts.append(len(made))
    assert counts == [2, 4, 6, 8, 10, 12, 13]


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


def test_a_replica_that_fails_ends_the_step_with_its_error(made):
    """At once, although the other waits for it in its normalisation."""
    network, step = make(InPlaceABNSync, (CPU, CPU), Fails("forward", features_of_the_last_two()))
    began = time.monotonic()
    with pytest.raises(ArithmeticError, match="out of luck"):
        step(batch())
    assert time.monotonic() - began < 5
    network.between = nn.Identity()
    libs.freeze(network)  # or the backward pass would wait, see above
    step(batch())
    assert len(made) == 2


def test_a_backward_pass_that_fails_calls_the_replicas_that_wait(made):
    called = []
    between = Fails("backward", features_of_the_last_two())
    network, step = make(InPlaceABNSync, (CPU, CPU), between, abort=lambda *call: called.append(call))
    libs.freeze(network)
    with pytest.raises(ArithmeticError, match="out of luck") as error:
        step(batch())
    assert len({replica for replica, _ in called}) == 2
    assert all(cause is error.value for _, cause in called)
    network.between = nn.Identity()
    step(batch())
    assert len(made) == 2


class GradientOfOtherStrides(torch.autograd.Function):
    """weight (N,C,1,1) → weight; its gradient has the strides (C,1,C,C), as cuDNN's channels-last."""

    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous().as_strided(grad.shape, (grad.shape[1], 1, *[grad.shape[1]] * 2))


@pytest.mark.parametrize("shape", [(4, 8, 1, 1), (4, 8, 3, 3)])
def test_gradients_get_the_strides_of_their_parameters(shape):
    network, gradients = nn.Conv2d(8, 4, shape[2], bias=False), []
    if shape[2] == 1:
        network.weight.data = network.weight.data.as_strided(shape, (8, 1, 1, 1))
    give_gradients_the_strides_of_parameters(network)
    weight = network.weight if shape[2] > 1 else GradientOfOtherStrides.apply(network.weight)
    network.weight.register_hook(gradients.append)  # after ours
    factors = torch.randn(shape)
    (weight * factors).sum().backward()
    assert torch.equal(network.weight.grad, factors)
    assert gradients[0].stride() == network.weight.stride() == network.weight.grad.stride()


def train_together(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for norm in (InPlaceABNSync, InPlaceABN):
        for accumulate in (1, 2):
            torch.manual_seed(0)
            network = Network(norm).double()
            if rank == 1:
                network.norm.running_mean.fill_(7)
            optimizer = build_optimizer(network, 0.1, 0.9, 1e-2)
            process = Process((CPU,), rank, 2)
            step = TrainStep(network, build_criterion(ohem=False), optimizer, process, accumulate=accumulate)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                step.wrap_model()
            broadcasts = step.model.broadcast_buffers
            for number in range(4):
                step(Batch(*(x[2 * rank : 2 * rank + 2] for x in batch())), number)
            results[norm.__name__, accumulate] = network.state_dict(), broadcasts, step.model.static_graph
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # as exit_process does


def test_processes_keep_weights_and_synchronised_buffers_equal(tmp_path):
    """Without exchanging the buffers that synchronised layers have made equal anyway."""
    processes = [CONTEXT.Process(target=train_together, args=(rank, tmp_path)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for (norm, accumulate), (state, broadcasts, static) in first.items():
        other = second[norm, accumulate][0]
        buffers = {name for name in state if "running" in name}
        assert broadcasts == (norm == "InPlaceABN")
        assert static == (accumulate == 1)
        assert all(torch.equal(state[name], other[name]) for name in state.keys() - buffers)
        equal = all(torch.equal(state[name], other[name]) for name in buffers)
        assert equal == (norm == "InPlaceABNSync")
        assert state["norm.running_mean"].abs().max() < 5


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


def test_the_gradient_norm_is_not_of_the_scaled_loss():
    norms = []
    for amp in ("off", "fp16"):
        torch.manual_seed(0)
        network = Network(ABN)
        optimizer = build_optimizer(network, 0.1, 0.9, 0.0)
        step = TrainStep(network, build_criterion(), optimizer, Process((CPU,)), amp)
        step.wrap_model()
        step(batch()._replace(images=batch().images.float()))
        norms.append(float(step.gradient_norm()))
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


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


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_rate_ends_the_run(rate, monkeypatch):
    monkeypatch.setitem(SCHEDULES, "own", lambda *_: rate)
    optimizer = build_optimizer(Network(ABN), 0.1, 0.9, 0.0)
    with pytest.raises(TrainingError, match=f"--schedule own: the rate after 3 steps is {rate}"):
        set_rates(optimizer, Recipe(schedule="own"), 3)
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("align_corners", [True, False])
def test_the_loss_enlarges_logits_as_predictions_do(align_corners):
    recipe = Recipe(NetworkConfig(align_corners=align_corners))
    step = build_step(Network(ABN), recipe, 255, Process((CPU,)))
    assert step.criterion.align_corners == align_corners


def test_ohem_counts_the_frames_of_clips():
    recipe = Recipe(NetworkConfig(), ohem=True, ohem_keep=1000, batch_size=4, accumulate=2, clip=5)
    assert build_step(Network(ABN), recipe, 255, Process((CPU,))).criterion.ohem_keep == 5000


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


def test_a_network_that_cannot_be_compiled_is_one_line(monkeypatch):
    class CompilerError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def fail(_):
        raise CompilerError("No working C++ compiler found\nand many lines")

    _, step = make()
    monkeypatch.setattr(step, "_step", fail)
    with pytest.raises(
        TrainingError, match=r"--compile failed \(No working C\+\+ compiler found\); leave it"
    ):
        step(batch())


def test_no_memory_is_one_line(monkeypatch):
    _, step = make()
    monkeypatch.setattr(step, "_micro_batch", lambda *_: torch.empty(2**60))
    with pytest.raises(TrainingError, match="out of memory; lower --batch-size"):
        step(batch())


def test_the_optimiser_is_sgd_with_plain_momentum_and_decay():
    """v ← 0.9 v + (gradient + decay · w), w ← w - rate · v (paper, section 4.2): no Nesterov."""
    network = nn.Linear(3, 1, bias=False).double()
    optimizer = build_optimizer(network, 0.1, 0.9, 1e-2)
    weight, velocity = network.weight.detach().clone(), 0
    for gradient in torch.randn(3, 1, 3, dtype=torch.float64):
        network.weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 1e-2 * weight
        weight = weight - 0.1 * velocity
        torch.testing.assert_close(network.weight.detach(), weight)
