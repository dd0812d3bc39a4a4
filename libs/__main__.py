"""python -m libs: which In-Place ABN serves, whether it is right, and what would make it faster."""

import sys

import torch
from torch import Tensor

from cc_attention.doctor import Doctor
from libs.modules import ABN, InPlaceABN
from libs.native import KERNELS


def compare(device: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], float]:
    """InPlaceABN's output and gradients, ABN's in float64, and the relative error allowed."""
    torch.manual_seed(0)
    exact, inplace = ABN(24), InPlaceABN(24)
    exact.weight.data.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    x, grad = (torch.randn(2, 24, 13, 37, dtype=torch.float64) for _ in "xg")
    x, grad = x.to(dtype).double(), grad.to(dtype).double()
    inplace.load_state_dict(exact.state_dict())
    exact.double()
    inplace.to(device, torch.promote_types(dtype, torch.float32))

    def results(layer: ABN, place: str, kind: torch.dtype) -> list[Tensor]:
        leaf = x.to(place, kind).requires_grad_()
        out = layer(leaf * 1)
        return [out, *torch.autograd.grad(out, [leaf, *layer.parameters()], grad.to(place, kind))]

    allowed = max(8 * torch.finfo(dtype).eps, 1e-13)
    return results(inplace, device, dtype), results(exact, "cpu", torch.float64), allowed


DOCTOR = Doctor(KERNELS, "libs::normalize_", compare, "ABN")

if __name__ == "__main__":
    sys.exit(DOCTOR.run())
