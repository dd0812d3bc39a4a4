"""A network on several GPUs of one process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate

Outputs = dict[str, Tensor]


class Replicas:
    """nn.DataParallel without its bottleneck: each replica's outputs stay on its device, for the loss.

    Args:
        network: its parameters are on the first device and receive the gradients of all replicas.
        devices: GPUs.
        context: entered by each replica's thread around its forward pass, autocast for one, which holds in
            the thread that enters it only.
        abort: called with a replica and the error that it failed with, or, if the backward pass failed, with
            each replica: lets those that wait for it go on, and fail too.
    """

    def __init__(
        self,
        network: nn.Module,
        devices: Sequence[torch.device],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
        abort: Callable[[nn.Module, BaseException], None] | None = None,
    ) -> None:
        self.network, self.devices, self.context = network, devices, context
        self.abort = abort or (lambda replica, error: None)
        # Threads that last: cuDNN's choice of kernels is remembered by thread.
        self._threads = [ThreadPoolExecutor(1) for _ in devices]
        self._replicas: list[nn.Module] = []
        self._errors: list[BaseException] = []

    def __call__(self, *parts: Sequence[Tensor]) -> list[Outputs]:
        """For each argument the list of its parts, on their devices → the outputs of each replica.

        Raises:
            BaseException: what the replica that failed first has raised.
        """
        self._replicas, self._errors = replicate(self.network, self.devices), []
        inputs = zip(*parts, strict=True)
        running = [
            thread.submit(self._run, replica, device, part)
            for thread, replica, device, part in zip(
                self._threads, self._replicas, self.devices, inputs, strict=True
            )
        ]
        outputs = [future.result() for future in running]
        if self._errors:
            raise self._errors[0]
        return [output for output in outputs if output is not None]

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, where the loss begins with one scalar on each device."""
        try:
            loss.backward()
        except BaseException as error:
            for replica in self._replicas:
                self.abort(replica, error)
            raise
        finally:
            self._replicas = []  # with their parameters

    def _run(self, replica: nn.Module, device: torch.device, inputs: tuple[Tensor, ...]) -> Outputs | None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self.context():
                return replica(*inputs)
        except BaseException as error:
            self._errors.append(error)
            self.abort(replica, error)
            return None
