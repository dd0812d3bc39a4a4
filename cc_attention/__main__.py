"""python -m cc_attention: which implementation serves, whether it is right, and what would make it faster."""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cc_attention import criss_cross_attention, native, reference
from cc_attention.doctor import Doctor, relative_errors


def compare(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], float]:
    """The operator's output and gradients, the reference's in float64, and the relative error allowed.

    Allowed is twice the reference's own error in this dtype, and one rounding (1e-13 in float64).
    """
    generator = torch.Generator().manual_seed(0)

    def random(channels: int) -> Tensor:
        return torch.randn(2, channels, 13, 37, generator=generator, dtype=torch.float64).to(dtype)

    tensors, grad = [random(channels) for channels in (8, 8, 24)], random(24)

    def results(function: Callable[..., Tensor], kind: torch.dtype, place: str) -> list[Tensor]:
        leaves = [x.to(place, kind).requires_grad_() for x in tensors]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(place, out.dtype))]

    exact = results(reference.criss_cross_attention, torch.float64, "cpu")
    rounding = max(relative_errors(results(reference.criss_cross_attention, dtype, device), exact))
    allowed = 2 * rounding + max(torch.finfo(dtype).eps, 1e-13)
    return results(criss_cross_attention, dtype, device), exact, allowed


DOCTOR = Doctor(native.KERNELS, "cc_attention::criss_cross_attention", compare, "the reference")

if __name__ == "__main__":
    sys.exit(DOCTOR.run())
