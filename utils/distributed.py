"""One process or several of them (torchrun): who am I, which devices are mine, how do the others fare."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor


class DeviceError(ValueError):
    """A device was asked for that is not there."""


class PeerError(RuntimeError):
    """Another process of the run failed; this one leaves, without a message if that one told why."""


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

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def stack(self, vector: Tensor) -> Tensor:
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

    def largest(self, value: int) -> int:
        """The largest of all processes' small numbers. It goes over the CPU: no device is waited for."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by the main process's."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def all_well(self, error: Exception | None = None) -> None:
        """All processes meet here, each with its error if it has one; all go on, or none.

        Raises:
            Exception: the process's own ``error``, if it is the first that has one, which is to be told.
            PeerError: another process has one, and tells it.
        """
        first = self.world_size - self.largest(0 if error is None else self.world_size - self.rank)
        if error is not None and first == self.rank:
            raise error
        if first < self.world_size:
            raise PeerError

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that each process runs for itself, without collectives; see ``all_well``."""
        try:
            yield
        except Exception as error:
            self.all_well(error)
        else:
            self.all_well()


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
def process_group(devices: tuple[torch.device, ...]) -> Iterator[Process]:
    """Join the other processes if torchrun started this one. Its process ends by ``leave``.

    Raises:
        PeerError: the connection to another process broke, since that one has ended.
    """
    if world_size() == 1:
        yield Process(devices)
        return
    # Gloo beside nccl: what the processes tell each other about their state must not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if devices[0].type == "cuda" else "gloo")
    process = Process(devices, dist.get_rank(), dist.get_world_size())
    try:
        yield process
    except RuntimeError as error:
        if not _is_broken_connection(error):
            raise
        raise PeerError(f"process {process.rank} lost the connection to another one") from None


def leave(status: int) -> NoReturn:
    """End this process; as one of several without tearing anything down.

    Destroying a group of gloo can deadlock: it waits, holding Python's lock, for a thread that wants this
    lock to let go of a tensor. After an error, the others may never come to where they would be waited for.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the CPU had no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _is_broken_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)
