"""InPlaceABNSync over processes and over nn.DataParallel's replicas against ABN on the joined batch."""

import copy
import pickle
import shutil
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from libs import ABN, InPlaceABN, InPlaceABNSync, norm_relu, prepare_to_compile
from libs.ops import implementation
from libs.synchronized import Processes, Rendezvous, own_group
from tests.libs.launches import launches

ACTIVATIONS = ("leaky_relu", "elu", "identity")
PARTS = {2: (2, 1), 3: (1, 3, 2)}  # unequal parts of the batch
CHANNELS = 4


def make(kind, activation="leaky_relu", **kwargs):
    layer = kind(CHANNELS, activation=activation, **kwargs).double()
    layer.weight.data = torch.tensor([-1.5, 1e-2, 0.7, 2.0], dtype=torch.float64)
    layer.bias.data = torch.linspace(-1, 1, CHANNELS, dtype=torch.float64)
    return layer


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def train_step(layer, x, grad, call=None):
    """Output, gradients and running statistics after one step; ``call`` computes with the layer."""
    x = x.clone().requires_grad_()
    out = (call or layer)(x * 1)
    out.backward(grad)
    return {
        "out": out.detach(),
        "dx": x.grad,
        "dweight": layer.weight.grad,
        "dbias": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


# Processes


def launches_of(layer, x, grad):
    """What a layer launches forward and backward after its first exchange, which compares channels."""
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        copied, outs = leaf.clone(), []
        forward = launches(lambda c=copied, o=outs: o.append(layer(c)))
        leaves = [leaf, *layer.parameters()]
        results = [forward, launches(lambda o=outs, ls=leaves: torch.autograd.grad(o[0], ls, grad))]
    return results


def run_rank(rank, folder, world):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    parts = torch.load(folder / "parts.pt")[rank]
    results = {activation: train_step(make(InPlaceABNSync, activation), *parts) for activation in ACTIVATIONS}

    ends = dist.new_group([0, world - 1])  # in a world of three, rank 1 is outside
    layer = make(
        InPlaceABNSync, process_group=ends if rank in (0, world - 1) else dist.GroupMember.NON_GROUP_MEMBER
    )
    results["group"] = train_step(copy.deepcopy(layer), *parts)
    layer = make(InPlaceABNSync, "identity")
    results["relu"] = train_step(layer, *parts, lambda x: norm_relu(layer, x, 0.5 * x)[1])
    if world == 2 and shutil.which("c++"):  # Inductor takes seconds, and a compiler
        layer = make(InPlaceABNSync)
        prepare_to_compile(layer)
        layer.compile(fullgraph=True)
        before = own_group()._get_sequence_number_for_group()
        results["compiled"] = train_step(layer, *parts)
        results["exchanges"] = own_group()._get_sequence_number_for_group() - before
        with pytest.raises(ValueError, match="the same channels on all processes"):
            prepare_to_compile(nn.Sequential(layer, InPlaceABNSync(CHANNELS + rank)))
    results["launches"] = launches_of(make(InPlaceABNSync), *parts)
    assert own_group() is not dist.group.WORLD  # gradients are not in its queue

    for name, layer_of_error, x in (
        ("channels", InPlaceABNSync(CHANNELS + rank), torch.randn(2, CHANNELS + rank, 3)),
        ("empty", InPlaceABNSync(CHANNELS), torch.randn(0, CHANNELS, 3)),
    ):
        with pytest.raises(ValueError, match="InPlaceABNSync") as error:
            layer_of_error(x)
        results[name] = str(error.value)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def check_against_joined(results, activation, parts, call=None):
    layer = make(ABN, activation)
    joined = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    want = train_step(layer, *joined, call and (lambda x: call(layer, x)))
    for name in ("out", "dx"):
        same(torch.cat([result[name] for result in results]), want[name])
    for name in ("dweight", "dbias"):
        same(sum(result[name] for result in results), want[name])
    for result in results:
        same(result["mean"], want["mean"])
        same(result["var"], want["var"])


@pytest.mark.parametrize("world", PARTS)
def test_processes(tmp_path, world):
    parts = [tuple(torch.randn(2, size, CHANNELS, 3, 5, dtype=torch.float64)) for size in PARTS[world]]
    torch.save(parts, tmp_path / "parts.pt")
    torch.multiprocessing.start_processes(run_rank, (tmp_path, world), world, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]

    for activation in ACTIVATIONS:
        check_against_joined([rank[activation] for rank in ranks], activation, parts)
    members = [0, world - 1]
    check_against_joined([ranks[i]["group"] for i in members], "leaky_relu", [parts[i] for i in members])
    for outsider in set(range(world)) - set(members):
        check_against_joined([ranks[outsider]["group"]], "leaky_relu", [parts[outsider]])
    relu = [rank["relu"] for rank in ranks]
    check_against_joined(relu, "identity", parts, lambda layer, x: nn.functional.relu(layer(x) + 0.5 * x))
    if "compiled" in ranks[0]:
        check_against_joined([rank["compiled"] for rank in ranks], "leaky_relu", parts)
        # Statistics and sums; none by tracing, which a process with a warm cache does less often.
        assert [rank["exchanges"] for rank in ranks] == [2, 2]
    for forward, backward in (rank["launches"] for rank in ranks):
        assert len([name for name in forward if "allgather" in name]) == 1, forward
        assert len([name for name in backward if "allgather" in name]) == 1, backward
        if implementation("cpu").startswith("C++"):
            assert len(forward) <= 8, forward
            assert len(backward) <= 6, backward
    counts = ", ".join(str(CHANNELS + rank) for rank in range(world))
    for rank, result in enumerate(ranks):
        assert f"this one has {CHANNELS + rank}" in result["channels"]
        assert result["channels"].endswith(counts)
        assert "(0, 4, 3)" in result["empty"]


# Replicas in threads


def in_threads(functions):
    """Each function's result, or the error that it raised, from a thread of its own named by its index."""
    results = [None] * len(functions)

    def call(index, function):
        try:
            results[index] = function()
        except Exception as error:
            results[index] = error

    threads = [
        threading.Thread(target=call, args=pair, name=str(pair[0]), daemon=True)
        for pair in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
        assert not thread.is_alive(), "a replica is still waiting"
    return results


def forward_in_threads(replicas, xs, announce=False):
    def forward(replica, x):
        try:
            return replica(x)
        except Exception as error:
            if announce:
                next(m for m in replica.modules() if isinstance(m, InPlaceABNSync)).abort(error)
            raise

    return in_threads([lambda r=r, x=x: forward(r, x) for r, x in zip(replicas, xs, strict=True)])


def network_of(kind, *between):
    return nn.Sequential(
        nn.Conv1d(3, CHANNELS, 1).double(),
        make(kind, "elu"),
        *between,
        nn.Conv1d(CHANNELS, CHANNELS, 3).double(),
        make(kind),
    )


def inputs(count):
    xs = [torch.randn(size, 3, 7, dtype=torch.float64) for size in PARTS[count]]
    grads = [torch.randn(size, CHANNELS, 5, dtype=torch.float64) for size in PARTS[count]]
    return xs, grads


@pytest.mark.parametrize("count", PARTS)
@pytest.mark.parametrize("lasting", [False, True])
def test_replicas_equal_one_with_the_joined_batch(replicate, count, lasting):
    network, plain = network_of(InPlaceABNSync), network_of(ABN)
    plain.load_state_dict(network.state_dict())
    kept, never_run = replicate(network, count), []
    for _ in range(3):  # statistics and gradients go on from one pass to the next
        xs, grads = inputs(count)
        xs = [x.requires_grad_() for x in xs]
        joined = torch.cat(xs).detach().requires_grad_()
        replicas = [replica.train() for replica in kept] if lasting else replicate(network, count)
        outs = forward_in_threads(replicas, xs)
        in_threads([lambda o=o, g=g: o.backward(g) for o, g in zip(outs, grads, strict=True)])
        want = plain(joined)
        want.backward(torch.cat(grads))

        same(torch.cat(outs), want)
        same(torch.cat([x.grad for x in xs]), joined.grad)
        for got, expected in zip(network.parameters(), plain.parameters(), strict=True):
            same(got.grad, expected.grad)
        for got, expected in zip(network.buffers(), plain.buffers(), strict=True):
            same(got, expected)
        never_run += [replicate(network, 3), replicate(network, 2)]
        network.eval()
        replicas = [replica.eval() for replica in kept] if lasting else replicate(network, count)
        outs = forward_in_threads(replicas, xs)  # gathers nothing
        same(torch.cat(outs), plain.eval()(joined))
        network.train()
        plain.train()


def test_one_replica_is_alone(replicate):
    x = torch.randn(3, 3, 7, dtype=torch.float64)
    network, plain = network_of(InPlaceABNSync), network_of(InPlaceABN)
    plain.load_state_dict(network.state_dict())
    for replica in (replicate(network, 1)[0], replicate(network, 1)[0]):
        same(replica(x), plain(x))


def test_replicas_do_not_hinder_copies(replicate):
    network = network_of(InPlaceABNSync)
    kept = replicate(network, 2)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert other[1].sync_group() is None
    assert kept[0][1].sync_group().size == 2


class Fails(nn.Module):
    """Raises in the thread named "1", forward or backward."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def forward(self, x):
        self.fail("forward")
        if self.when == "backward":
            x = x * 1
            x.register_hook(lambda grad: self.fail("backward"))
        return x

    def fail(self, now):
        if now == self.when and threading.current_thread().name == "1":
            raise ArithmeticError("out of luck")


def check_failure(results, match, seconds, started):
    """Replica 1 ended with its own error, and the others with one that says so, in time."""
    assert time.monotonic() - started < seconds
    assert str(results[1]) == "out of luck"
    for index in {*range(len(results))} - {1}:
        assert isinstance(results[index], RuntimeError)
        assert str(results[index]).startswith("another replica of InPlaceABNSync failed: ")
        assert match in str(results[index])


def check_works_again(network, replicate):
    """The network without the module that fails trains, and no thread is left."""
    sound = nn.Sequential(*(module for module in network if not isinstance(module, Fails)))
    xs, _ = inputs(3)
    outs = forward_in_threads(replicate(sound, 3), xs)
    assert all(isinstance(out, torch.Tensor) for out in outs)
    assert not [thread for thread in threading.enumerate() if thread.name in ("0", "1", "2")]


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("where", ["start", "between"])
def test_a_replica_fails_forward(replicate, monkeypatch, where, announce):
    network = network_of(InPlaceABNSync, Fails("forward"))
    match = "ArithmeticError: out of luck" if announce else "replica 1 ended before"
    if where == "start":
        network = nn.Sequential(Fails("forward"), *network_of(InPlaceABNSync))
        if not announce:  # nobody knows its thread: only the time tells
            monkeypatch.setattr(Rendezvous, "timeout", 0.5)
            match = "replica 1 did not come to this layer within 0.5 s"
    started, (xs, _) = time.monotonic(), inputs(3)
    check_failure(forward_in_threads(replicate(network, 3), xs, announce), match, 2, started)
    check_works_again(network, replicate)


def test_a_replica_fails_backward(replicate):
    network = network_of(InPlaceABNSync, Fails("backward"))
    xs, grads = inputs(3)
    outs = forward_in_threads(replicate(network, 3), xs)
    started = time.monotonic()
    results = in_threads([lambda o=o, g=g: o.backward(g) for o, g in zip(outs, grads, strict=True)])
    check_failure(results, "replica 1 ended before", 2, started)
    check_works_again(network, replicate)


def test_a_layers_own_error_stops_the_others(replicate):
    xs = [torch.randn(2, CHANNELS, 5), torch.randn(2, CHANNELS + 1, 5)]
    first, second = forward_in_threads(replicate(InPlaceABNSync(CHANNELS), 2), xs)
    assert isinstance(second, ValueError)
    assert isinstance(first, RuntimeError)
    assert "ValueError: InPlaceABNSync needs (B,4,…)" in str(first)


def test_replicas_at_different_layers(replicate):
    network = nn.ModuleList([InPlaceABNSync(CHANNELS), InPlaceABNSync(CHANNELS)])
    one, two = replicate(network, 2)
    errors = in_threads([lambda: one[0](torch.randn(2, CHANNELS)), lambda: two[1](torch.randn(2, CHANNELS))])
    assert all("not at the same layer" in str(error) for error in errors)


def test_an_error_while_the_vectors_are_joined(replicate, monkeypatch):
    layers = replicate(InPlaceABNSync(CHANNELS), 2)
    outs = forward_in_threads(layers, [torch.randn(2, CHANNELS).requires_grad_() * 1 for _ in layers])
    monkeypatch.setattr("libs.synchronized.torch.stack", None)
    results = in_threads([lambda out=out: out.sum().backward() for out in outs])
    assert {type(result) for result in results} == {TypeError, RuntimeError}


def test_replicas_within_several_processes(replicate, monkeypatch):
    layer = replicate(InPlaceABNSync(CHANNELS), 2)[0]
    monkeypatch.setattr(Processes, "size", 2)
    with pytest.raises(RuntimeError, match=r"one of 2 replicas of nn\.DataParallel in one of 2 processes"):
        layer(torch.randn(2, CHANNELS))
