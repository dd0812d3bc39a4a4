"""One process or several (torchrun): its rank and devices, what processes exchange, how they end together."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


class DeviceError(ValueError):
    """A device was asked for that is not there."""

    exit_status = 2


class PeerError(RuntimeError):
    """Another process of the run failed; this one ends, without a message if that one gave the reason."""

    exit_status = 1


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and its devices: one, or several that share its batches."""

    devices: tuple[torch.device, ...]
    rank: int = 0
    world_size: int = 1

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return self.devices[0]

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    @property
    def parts(self) -> int:
        """How many parts a batch is split into, over all processes and their devices."""
        return self.world_size * len(self.devices)

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def find_difference(self, value: Any) -> tuple[int, Any, Any] | None:
        """Compare the values of all processes; the main one is told, and reports it.

        Returns:
            None if all are equal; or the first rank that differs, the main process's value, and that rank's.

        Raises:
            PeerError: in the other processes, if there is a difference.
        """
        values = self.all_gather_object(value)
        rank = next((rank for rank, other in enumerate(values) if other != values[0]), None)
        if rank is None:
            return None
        if not self.is_main:
            raise PeerError
        return rank, values[0], values[rank]

    def all_gather(self, vector: Tensor) -> Tensor:
        """The vectors (N,) of all processes, stacked (P,N) by rank."""
        vectors = [torch.empty_like(vector) for _ in range(self.world_size)]
        dist.all_gather(vectors, vector)
        return torch.stack(vectors)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.sum(value) / self.world_size

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def differentiable_sum(self, value: Tensor) -> Tensor:
        """As ``sum``, with gradients: each process's value gets the sum of all processes' gradients."""
        return _AllReduceSum.apply(value) if self.world_size > 1 else value

    def max(self, value: int) -> int:
        """The maximum over all processes. It goes over the CPU, so no device is waited for."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def raise_if_any_failed(self, error: Exception | None = None) -> None:
        """A point that all processes reach, each with its error if it has one: all go on, or none.

        Raises:
            Exception: this process's own ``error``, if its rank is the lowest of those that failed.
            PeerError: another process failed, and reports why.
        """
        first = self.world_size - self.max(0 if error is None else self.world_size - self.rank)
        if error is not None and first == self.rank:
            raise error
        if first < self.world_size:
            raise PeerError

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A block without collectives after which all processes go on, or none: ``raise_if_any_failed``."""
        try:
            yield
        except Exception as error:
            self.raise_if_any_failed(error)
        else:
            self.raise_if_any_failed()


class _AllReduceSum(torch.autograd.Function):
    """Σ over processes; its gradient is the sum of the gradients that the processes have for it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def choose_devices(gpu: str) -> tuple[torch.device, ...]:
    """The devices of ``--gpu``: "auto" (a GPU if there is one), "cpu", a GPU's number, or several: "0,1".

    The first GPU becomes the current one. Under torchrun "auto" is the GPU of the process's local rank.

    Raises:
        DeviceError: no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu == "cpu" or (gpu == "auto" and count == 0):
        return (torch.device("cpu"),)
    if gpu == "auto":
        numbers = [os.environ.get("LOCAL_RANK", "0")]
    else:
        numbers = gpu.split(",")
        if not all(number.isdecimal() for number in numbers):
            raise DeviceError(f"--gpu {gpu}: expected auto, cpu, or numbers of GPUs as in 0,1")
        if world_size() > 1:
            raise DeviceError(f"--gpu {gpu}: under torchrun each process takes its own GPU; leave --gpu out")
    indices = [int(number) for number in numbers]
    for index in indices:
        if index >= count:
            hint = f"start at most {count} processes" if gpu == "auto" else "use --gpu auto or --gpu cpu"
            raise DeviceError(f"--gpu {gpu}: there is no GPU {index}, {count} visible; {hint}")
    if len(set(indices)) < len(indices):
        raise DeviceError(f"--gpu {gpu}: names a GPU twice")
    torch.cuda.set_device(indices[0])
    return tuple(torch.device("cuda", index) for index in indices)


@contextmanager
def process_group(gpu: str) -> Iterator[Process]:
    """This process with its devices, ``choose_devices(gpu)``, joined to the others if torchrun started it.

    Under torchrun, end the process through ``exit_process``.

    Raises:
        DeviceError: as ``choose_devices``.
        PeerError: another process has no such device, or has ended and broken the connection.
    """
    if world_size() == 1:
        yield Process(choose_devices(gpu))
        return
    # Gloo beside nccl: what the processes tell each other about their state must not wait for a GPU.
    on_gpu = gpu != "cpu" and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    process = Process((torch.device("cpu"),), dist.get_rank(), dist.get_world_size())
    try:
        with process.all_or_none():  # joined before, or the others would wait for one that lacks a device
            devices = choose_devices(gpu)
        yield replace(process, devices=devices)
    except RuntimeError as error:
        if not _is_broken_connection(error):
            raise
        raise PeerError("lost the connection to another process") from None


def exit_process(status: int) -> NoReturn:
    """End this process; one of several ends without destroying its process group.

    Destroying a gloo group can deadlock: it waits, holding Python's lock, for a thread that needs this lock
    to release a tensor. After an error, the others may never reach the point where they would be waited for.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def sum_on_first_device(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors that lie on several devices, on the first one's."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor.to(total.device)
    return total


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU had no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
