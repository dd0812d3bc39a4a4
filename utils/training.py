"""One step of training: forward, loss, backward, update."""

import math
import os
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.criterion import Criterion, Losses
from utils.distributed import Process
from utils.replicas import Replicas

# --amp: the type that convolutions and attention compute in.
PRECISIONS: dict[str, torch.dtype | None] = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """Training that cannot go on: one line that says where it stopped and why."""


def build_optimizer(
    network: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD in one pass over the parameters (paper, section 4.2)."""
    optimizer = torch.optim.SGD(
        network.parameters(), learning_rate, momentum, weight_decay=weight_decay, fused=True
    )
    complete_momentum(optimizer)
    return optimizer


def complete_momentum(optimizer: torch.optim.SGD) -> None:
    """Give a momentum of zero to each parameter that is trained and has none.

    PyTorch would make the buffers in the first step; uninitialised, if fp16 overflows there, and only if no
    parameter has one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group["momentum"] and parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


class TrainStep:
    """Trains a network by one batch a call.

    The batch is this process's share; it is split over the process's devices. Nothing waits for a device: the
    optimiser finds out there whether fp16 overflowed and the step is to be skipped.

    Args:
        model: maps images and the keys of their samples to a dict of logits; on ``process.device``. See also
            ``start``.
        criterion: its loss.
        optimizer: of its parameters.
        process: with whom the batch is shared, and by which devices.
        amp: a key of ``PRECISIONS``; parameters, their gradients and the loss stay fp32.
        accumulate: into how many parts the batch is cut, which are computed one after another, so that less
            memory is needed. Each has its own statistics and its own loss; the step takes their mean.
        abort: called with a replica and the error it failed with, see ``Replicas``.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.SGD,
        process: Process,
        amp: str = "off",
        accumulate: int = 1,
        abort: Callable[[nn.Module, BaseException], None] | None = None,
    ) -> None:
        self.criterion, self.optimizer, self.process = criterion, optimizer, process
        self.dtype, self.accumulate = PRECISIONS[amp], accumulate
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=amp == "fp16")
        self.network, self._abort = model, abort
        self.model: Callable[..., Any] = model

    def start(self, compiled: bool = False) -> None:
        """Make the network ready for its devices and processes; once its weights are what they are to be.

        Args:
            compiled: through ``torch.compile``; not for several devices.
        """
        process, model = self.process, self.network
        if compiled:
            model.compile()
        if len(process.devices) > 1:
            self.model = Replicas(model, process.devices, self._autocast, self._abort)
        elif process.world_size > 1:
            self.model = DistributedDataParallel(model)

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Losses, Tensor]:
        """Update the network.

        Args:
            images: (B,3,H,W) on the CPU, pinned if they go to a GPU.
            labels: (B,H,W) train ids.
            keys: (B,) int64, what the samples' dropout is drawn from.

        Returns:
            The step's losses, without gradients, and logits (b,N,h,w) of the first b images.
        """
        self.optimizer.zero_grad(set_to_none=True)
        model, every, logits = self.model, [], []
        batches = list(zip(*(x.chunk(self.accumulate) for x in (images, labels, keys)), strict=True))
        for number, batch in enumerate(batches, start=1):
            more = number < len(batches)
            # Processes exchange gradients once, after the last part.
            with model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext():
                losses, outputs = self._part(*batch)
            every.append(torch.stack(losses).detach())
            logits.append(outputs["out"].detach())
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Losses(*torch.stack(every).mean(0)), logits[0]

    def _part(self, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Losses, dict[str, Tensor]]:
        devices = self.process.devices
        image_parts, label_parts, key_parts = (
            [
                part.to(device, non_blocking=True)
                for part, device in zip(x.chunk(len(devices)), devices, strict=True)
            ]
            for x in (images, labels, keys)
        )
        image_parts = [part.contiguous(memory_format=torch.channels_last) for part in image_parts]
        if isinstance(self.model, Replicas):
            outputs = self.model(image_parts, key_parts)
        else:
            with self._autocast():
                outputs = [self.model(image_parts[0], key_parts[0])]
        gather = self.process.stack if self.process.world_size > 1 else None
        losses = self.criterion.over(list(zip(outputs, label_parts, strict=True)), gather)
        loss = self.scaler.scale(losses.total / self.accumulate)
        if isinstance(self.model, Replicas):
            self.model.backward(loss)
        else:
            loss.backward()
        return losses, outputs[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def gradient_norm(self) -> Tensor:
        """The norm of the last step's whole gradient; infinite where fp16 overflowed."""
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        return torch.nn.utils.get_total_norm(gradients)


class LossWindow:
    """The losses of the steps since they were last read, which waits for the device.

    Args:
        process: the losses are those of all processes.
        batch_size: images of a step, over all processes.
    """

    def __init__(self, process: Process, batch_size: int) -> None:
        self.process, self.batch_size = process, batch_size
        self._losses: list[Tensor] = []
        self._seconds = 0.0
        self._began = time.perf_counter()

    def begin(self) -> None:
        """A step begins, the wait for its batch included; what lies between steps is not counted."""
        self._began = time.perf_counter()

    def end(self, losses: Losses) -> None:
        """A step ended."""
        self._losses.append(torch.stack(losses))
        self._seconds += time.perf_counter() - self._began

    def read(self, step: int) -> dict[str, float]:
        """Means since the last call, by the names that they are logged with; ``step`` is the last one.

        Raises:
            TrainingError: a loss is infinite or not a number.
        """
        began = time.perf_counter()
        losses = self.process.mean(torch.stack(self._losses)).double().cpu()  # (steps, 4)
        seconds = self._seconds + time.perf_counter() - began
        count = len(losses)
        for index, loss in enumerate(losses[:, 0].tolist()):
            if not math.isfinite(loss):  # in all processes alike
                fault = f"step {step - count + 1 + index}: the loss is {loss}"
                advice = "earlier checkpoints are kept, a lower --learning-rate may help"
                self.process.all_well(TrainingError(f"{fault}; {advice}"))
        self._losses, self._seconds = [], 0.0
        loss, head, aux, kept = losses.mean(0).tolist()
        return {
            "loss": loss,
            "loss_head": head,
            "loss_aux": aux,
            "kept_pixels": kept,
            "images_per_second": count * self.batch_size / seconds,
        }


def make_deterministic() -> None:
    """Kernels that give the same bits again on the same GPU; called before the GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names what has no such kernel


def peak_memory_mib(devices: tuple[torch.device, ...]) -> float:
    """The most that was held at a time: by PyTorch on a GPU, by this process on a CPU."""
    if devices[0].type == "cuda":
        return max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
