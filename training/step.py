"""One step of training: forward, loss, backward, update."""

import inspect
import math
import os
import resource
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataset import Batch
from training.criterion import CRITERIA, Criterion, Losses, Part
from training.recipes import PRECISIONS, Recipe
from training.replicas import Replicas
from training.schedule import SCHEDULES
from utils.distributed import Process, is_out_of_memory


class TrainingError(RuntimeError):
    """Training that cannot go on: one line that says where it stopped and why."""

    exit_status = 1


def build_optimizer(
    network: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """SGD, fused into one pass over the parameters (paper, section 4.2).

    A network with a method ``parameter_groups`` chooses its groups by itself: dicts with "params" and perhaps
    a "lr" and a "weight_decay" of their own, which the schedule scales and a resumed run keeps.
    """
    choose: Callable[[], Any] = getattr(network, "parameter_groups", network.parameters)
    optimizer = torch.optim.SGD(choose(), learning_rate, momentum, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    complete_momentum(optimizer)
    return optimizer


def complete_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give a momentum of zero to each parameter that is trained and has none.

    PyTorch would make the buffers in the first step; uninitialised, if fp16 overflows there, and only if no
    parameter has one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if group.get("momentum") and parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def set_rates(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Set the rate of each parameter group, from its own initial one, for the step after ``step`` steps.

    Raises:
        TrainingError: as ``rate_after``.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate_after(step, recipe, group["initial_lr"])


def rate_after(step: int, recipe: Recipe, initial: float) -> float:
    """The rate for the step after ``step`` steps, of a group that began with ``initial``.

    Raises:
        TrainingError: the schedule returns a negative or infinite rate, or none.
    """
    rate = SCHEDULES[recipe.schedule](initial, step, recipe.num_steps, recipe.power)
    if not 0 <= rate < math.inf:
        raise TrainingError(f"--schedule {recipe.schedule}: the rate after {step} steps is {rate}")
    return rate


def keeps_buffers_equal(network: nn.Module, world_size: int) -> bool:
    """Whether a step leaves the same bits in the buffers of all processes, if they were the same before.

    A module with buffers says so by a method ``sync_group`` that gives a group of all processes.
    """

    def is_synchronized(module: Any) -> bool:
        return hasattr(module, "sync_group") and getattr(module.sync_group(), "size", 1) == world_size

    return all(is_synchronized(module) for module in network.modules() if module._buffers)


def _name_of_broadcast_buffers() -> str:
    """DistributedDataParallel's ``broadcast_buffers``, which later versions of PyTorch have renamed."""
    names = inspect.signature(DistributedDataParallel).parameters
    return "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"


def give_gradients_the_strides_of_parameters(network: nn.Module) -> None:
    """Let each gradient have its parameter's strides also where they are arbitrary, at sizes of 1.

    The weight of a channels-last 1×1 convolution may have the strides (C,1,1,1) and its gradient
    (C,1,C,C), in the same memory: DistributedDataParallel would warn of a slow copy, and copy slowly.
    """
    for parameter in network.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_with_strides, parameter.stride()))


def _with_strides(strides: tuple[int, ...], grad: Tensor) -> Tensor:
    if grad.stride() == strides or any(
        size != 1 and stride != wanted
        for size, stride, wanted in zip(grad.shape, grad.stride(), strides, strict=True)
    ):
        return grad
    return grad.as_strided(grad.shape, strides)


class TrainStep:
    """Trains a network by one batch a call.

    The batch is this process's share; it is split over the process's devices. Nothing waits for a device: the
    optimiser finds out there whether fp16 overflowed and the step is to be skipped.

    Args:
        network: maps images and the keys of their samples to a dict of outputs; on ``process.device``. Call
            ``wrap_model`` before the first step.
        criterion: its loss.
        optimizer: of its parameters.
        process: with whom the batch is shared, and by which devices.
        amp: a key of ``PRECISIONS``; parameters, their gradients and the loss stay fp32.
        accumulate: parts that the batch is cut into, computed one after another to need less memory.
            Each part has its own statistics and its own loss; the step takes their mean.
        abort: called with a replica and the error it failed with, see ``Replicas``.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        optimizer: torch.optim.Optimizer,
        process: Process,
        amp: str = "off",
        accumulate: int = 1,
        abort: Callable[[nn.Module, BaseException], None] | None = None,
    ) -> None:
        self.criterion, self.optimizer, self.process = criterion, optimizer, process
        self.dtype, self.accumulate = PRECISIONS[amp], accumulate
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=amp == "fp16")
        self.network, self._abort = network, abort
        self.model: Callable[..., Any] = network

    def wrap_model(self, compiled: bool = False) -> None:
        """Make the network ready for its devices and processes, once its weights are loaded.

        Args:
            compiled: compile it with ``torch.compile``; not for several devices.
        """
        process, network = self.process, self.network
        if compiled:
            network.compile()
        if len(process.devices) > 1:
            self.model = Replicas(network, process.devices, self._autocast, self._abort)
        elif process.world_size > 1:
            process.broadcast(network.buffers())
            give_gradients_the_strides_of_parameters(network)
            settings: dict[str, Any] = {
                _name_of_broadcast_buffers(): not keeps_buffers_equal(network, process.world_size),
                "gradient_as_bucket_view": True,
                # All steps use the same parameters; but it goes neither with no_sync nor with the compiler.
                "static_graph": self.accumulate == 1 and not compiled,
            }
            self.model = DistributedDataParallel(network, **settings)

    def __call__(self, batch: Batch, number: int | None = None) -> tuple[Losses, Tensor]:
        """Update the network.

        Args:
            batch: images (B,3,H,W) or (B,3,T,H,W), train ids (B,H,W) or (B,T,H,W) and the samples' dropout
                keys (B,), on the CPU, pinned if they go to a GPU.
            number: of the step, for messages.

        Returns:
            The step's losses, without gradients, and logits (b,N,h,w) of the first b images.

        Raises:
            TrainingError: out of memory, or the network cannot be compiled.
        """
        try:
            return self._step(batch)
        except RuntimeError as error:
            if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                reason = str(error).strip().splitlines()[0]
                raise TrainingError(f"--compile failed ({reason}); leave it out") from None
            if not is_out_of_memory(error):
                raise
            where = "" if number is None else f"step {number}: "
            raise TrainingError(
                f"{where}out of memory; lower --batch-size or --input-size, or try --accumulate 2, "
                "--checkpoint-activations or --amp bf16"
            ) from None

    def _step(self, batch: Batch) -> tuple[Losses, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        model, all_losses, logits = self.model, [], []
        micro_batches = list(zip(*(x.chunk(self.accumulate) for x in batch), strict=True))
        for number, micro_batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            # Processes exchange gradients once, after the last part.
            wait = not is_last and isinstance(model, DistributedDataParallel)
            with model.no_sync() if wait else nullcontext():  # type: ignore[attr-defined]
                losses, outputs = self._micro_batch(*micro_batch)
            all_losses.append({name: value.detach() for name, value in losses.items()})
            logits.append(outputs["out"].detach())
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        means = {name: torch.stack([x[name] for x in all_losses]).mean(0) for name in all_losses[0]}
        return means, logits[0]

    def _micro_batch(self, images: Tensor, labels: Tensor, keys: Tensor) -> tuple[Losses, dict[str, Tensor]]:
        devices = self.process.devices
        image_parts, label_parts, key_parts = (
            [
                part.to(device, non_blocking=True)
                for part, device in zip(x.chunk(len(devices)), devices, strict=True)
            ]
            for x in (images, labels, keys)
        )
        layout = torch.channels_last if images.dim() == 4 else torch.channels_last_3d
        image_parts = [part.contiguous(memory_format=layout) for part in image_parts]
        if isinstance(self.model, Replicas):
            outputs = self.model(image_parts, key_parts)
        else:
            with self._autocast():
                outputs = [self.model(image_parts[0], key_parts[0])]
        # The network folds the frames of clips into the batch.
        label_parts = [part if part.dim() == 3 else part.flatten(0, 1) for part in label_parts]
        parts: list[Part] = list(zip(outputs, label_parts, strict=True))
        losses = self.criterion.batch_losses(parts, self.process)
        loss = self.scaler.scale(losses["loss"] / self.accumulate)
        if isinstance(self.model, Replicas):
            self.model.backward(loss)
        else:
            loss.backward()
        return losses, outputs[0]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.process.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def measurements(self) -> dict[str, float | None]:
        """What is logged beside the losses; waits for the device."""
        norm = self.gradient_norm().item()
        return {
            "gradient_norm": norm if math.isfinite(norm) else None,
            "memory_mib": peak_memory_mib(self.process.devices),
        }

    def gradient_norm(self) -> Tensor:
        """The norm of the last step's whole gradient; infinite where fp16 overflowed."""
        gradients = [
            parameter.grad
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        return torch.nn.utils.get_total_norm(gradients)


def build_step(
    network: nn.Module,
    recipe: Recipe,
    ignore_index: int,
    process: Process,
    abort: Callable[[nn.Module, BaseException], None] | None = None,
) -> TrainStep:
    """Criterion, optimiser and step of a recipe; ``ignore_index`` is the train id that does not count."""
    optimizer = build_optimizer(network, recipe.learning_rate, recipe.momentum, recipe.weight_decay)
    images_at_once = recipe.batch_size * recipe.clip // recipe.accumulate
    criterion = CRITERIA[recipe.criterion](
        ohem=recipe.ohem,
        ohem_thres=recipe.ohem_thres,
        # The reference keeps so many of the two images on each of its GPUs.
        ohem_keep=recipe.ohem_keep * images_at_once // 2,
        aux_weight=recipe.aux_weight,
        ignore_index=ignore_index,
        ccl=recipe.ccl,
        ccl_kind=recipe.ccl_kind,
        align_corners=recipe.network.align_corners,
    )
    return TrainStep(network, criterion, optimizer, process, recipe.amp, recipe.accumulate, abort)


def make_deterministic() -> None:
    """Choose kernels that give the same bits again on the same GPU; call it before the GPU is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # a warning names what has no such kernel


def peak_memory_mib(devices: tuple[torch.device, ...]) -> float:
    """Peak memory in MiB: allocated by PyTorch on a GPU, resident for this process on a CPU."""
    if devices[0].type == "cuda":
        return max(torch.cuda.max_memory_allocated(device) for device in devices) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
