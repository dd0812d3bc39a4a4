"""One process or several of them (torchrun): who am I, which device is mine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


class DeviceError(ValueError):
    """A device was asked for that is not there."""


@dataclass(frozen=True)
class Process:
    """This process among those of the run, and its device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over all processes."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value / self.world_size


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def choose_device(gpu: str) -> torch.device:
    """The device of ``--gpu``: "auto" (a GPU if there is one), "cpu", or a GPU's number.

    A GPU becomes the current one. Under torchrun "auto" is the GPU of the process's local rank.

    Raises:
        DeviceError: no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu == "cpu" or (gpu == "auto" and count == 0):
        return torch.device("cpu")
    if gpu == "auto":
        gpu = os.environ.get("LOCAL_RANK", "0")
    elif "," in gpu:
        processes = gpu.count(",") + 1
        raise DeviceError(
            f"--gpu {gpu}: one process drives one device; to train on several run "
            f"CUDA_VISIBLE_DEVICES={gpu} torchrun --nproc-per-node {processes} train.py …"
        )
    elif world_size() > 1:
        raise DeviceError(f"--gpu {gpu}: under torchrun each process takes its own GPU; leave --gpu out")
    if not gpu.isdecimal():
        raise DeviceError(f"--gpu {gpu}: expected auto, cpu or the number of a GPU")
    if int(gpu) >= count:
        raise DeviceError(f"--gpu {gpu}: no such GPU, {count} visible; use --gpu auto or --gpu cpu")
    torch.cuda.set_device(int(gpu))
    return torch.device("cuda", int(gpu))


@contextmanager
def process_group(gpu: str) -> Iterator[Process]:
    """Join the other processes if torchrun started this one, and leave them when all went well.

    Raises:
        DeviceError: see ``choose_device``.
    """
    device = choose_device(gpu)
    if world_size() == 1:
        yield Process(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield Process(device, dist.get_rank(), dist.get_world_size())
    # Not after an error: the others may wait in a collective; torchrun ends them once this process has ended.
    dist.destroy_process_group()
