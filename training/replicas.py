"""A network on several GPUs of one process."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import replicate
from torch.nn.parallel._functions import Broadcast

Outputs = dict[str, Tensor]
SIMPLE = frozenset((bool, int, float, str))


class Replicas:
    """nn.DataParallel without its bottlenecks: the outputs stay on their devices, the replicas last.

    A step copies the parameters only. Replicas are made anew after a failure, and when something of the
    network has changed other than by its steps: the mode of a module, an attribute that is a number or a
    string, a parameter or buffer that was replaced, or a buffer that was written to. Until then each replica
    updates its own buffers; the first replica's are the network's.

    Args:
        network: its parameters are on the first device and receive the gradients of all replicas.
        devices: GPUs.
        context: entered by each replica's thread around its forward pass, autocast for one, which holds in
            the thread that enters it only.
        abort: wakes the replicas that wait for one that failed, so that they fail too. It is called with that
            replica and its error; after a failed backward pass, which names none, with each replica.
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
        self._state: list[object] = []  # the network's that they were made of
        self._places: list[tuple[nn.Module, str, int]] = []
        self._errors: list[BaseException] = []

    def __call__(self, *parts: Sequence[Tensor]) -> list[Outputs]:
        """For each argument the list of its parts, on their devices → the outputs of each replica.

        Raises:
            BaseException: what the replica that failed first has raised.
        """
        if self._replicas and _state_of(self.network) == self._state:
            self._set_parameters(Broadcast.apply(self.devices, *self.network.parameters()))
        else:
            self._replicas = replicate(self.network, self.devices)
            self._places = _places_of_parameters(self.network, self._replicas)
        self._errors = []
        inputs = zip(*parts, strict=True)
        running = [
            thread.submit(self._run, replica, device, part)
            for thread, replica, device, part in zip(
                self._threads, self._replicas, self.devices, inputs, strict=True
            )
        ]
        outputs = [future.result() for future in running]
        if self._errors:
            self._replicas = []
            raise self._errors[0]
        return [output for output in outputs if output is not None]

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, where the loss begins with one scalar on each device."""
        try:
            loss.backward()
        except BaseException as error:
            for replica in self._replicas:
                self.abort(replica, error)
            self._replicas = []
            raise
        self._set_parameters(None)  # they would take memory until the next step
        self._state = _state_of(self.network)

    def _set_parameters(self, copies: Sequence[Tensor] | None) -> None:
        for module, name, index in self._places:
            # Parameters of replicas are plain attributes; Module's own __setattr__ is ten times as slow.
            vars(module)[name] = None if copies is None else copies[index]

    def _run(self, replica: nn.Module, device: torch.device, inputs: tuple[Tensor, ...]) -> Outputs | None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), self.context():
                return replica(*inputs)
        except BaseException as error:
            self._errors.append(error)
            self.abort(replica, error)
            return None


def _state_of(network: nn.Module) -> list[object]:
    """What a network's replicas depend on besides the values of its parameters."""
    state: list[object] = []
    for module in network.modules():
        state += [value for value in vars(module).values() if type(value) in SIMPLE]
        state += map(id, (module, *module._parameters.values(), *module._buffers.values()))
        state += [buffer._version for buffer in module._buffers.values() if buffer is not None]
    return state


def _places_of_parameters(
    network: nn.Module, replicas: Sequence[nn.Module]
) -> list[tuple[nn.Module, str, int]]:
    """Module, name and index of each replica's parameters, among the copies that ``Broadcast`` gives."""
    indices = {parameter: index for index, parameter in enumerate(network.parameters())}
    places = []
    for number, replica in enumerate(replicas):
        for module, copy in zip(network.modules(), replica.modules(), strict=True):
            copy._former_parameters = {}  # type: ignore[assignment]  # would keep those of the first step
            places += [
                (copy, name, number * len(indices) + indices[parameter])
                for name, parameter in module._parameters.items()
                if parameter is not None
            ]
    return places
