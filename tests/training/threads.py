"""Processes that share a batch, played by threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch


class ThreadProcess:
    """A ``Process`` whose collectives are those of threads."""

    def __init__(self, rank, barrier, slots):
        self.rank, self.barrier, self.slots = rank, barrier, slots
        self.world_size = len(slots)

    def all_gather(self, vector):
        self.slots[self.rank] = vector
        self.barrier.wait(10)
        stacked = torch.stack(self.slots)
        self.barrier.wait(10)
        return stacked

    def differentiable_sum(self, value):
        return _Sum.apply(value, self)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, process):
        ctx.process = process
        return process.all_gather(value.detach()).sum(0)

    @staticmethod
    def backward(ctx, grad):
        return ctx.process.all_gather(grad).sum(0), None


def in_threads(function, *parts):
    """function(process, *its part of each) of each process, in the order of their ranks."""
    count = len(parts[0])
    barrier, slots = threading.Barrier(count), [None] * count
    processes = [ThreadProcess(rank, barrier, slots) for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, processes, *parts))
