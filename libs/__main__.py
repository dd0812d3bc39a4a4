"""python -m libs: which In-Place ABN serves, whether it is right, and what would make it faster.

Exit status 1 if it disagrees with ABN. (python -m cc_attention tells about compilers and GPUs as well.)
"""

import os
import sys

import torch
from torch import Tensor

from libs import native
from libs.modules import ABN, InPlaceABN
from libs.ops import implementation

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def errors(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest errors of output and gradients, relative to ABN in float64."""
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
        gradients = torch.autograd.grad(out, [leaf, *layer.parameters()], grad.to(place, kind))
        return [y.cpu().double() for y in (out, *gradients)]

    pairs = zip(results(inplace, device, dtype), results(exact, "cpu", torch.float64), strict=True)
    forward, *backward = [((ours - want).abs().max() / want.abs().max()).item() for ours, want in pairs]
    return forward, max(backward)


def main() -> int:
    print(f"binary     {native.BINARY if native.BINARY.exists() else 'none'}")
    print(f"CPU        {implementation('cpu')}; {torch.get_num_threads()} threads")
    print(f"CUDA       {implementation('cuda')}\n")
    print(f"{'self-check':<10} {'dtype':<9} {'forward':>9} {'gradients':>9} {'allowed':>9}")
    right = True
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        for dtype in _DTYPES:
            name, allowed = str(dtype).removeprefix("torch."), max(8 * torch.finfo(dtype).eps, 1e-13)
            try:
                found = errors(device, dtype)
            except RuntimeError as error:
                right = False
                print(f"{device:<10} {name:<9} fails: {str(error).splitlines()[0]}")
                continue
            good = max(found) <= allowed
            right = right and good
            verdict = "right" if good else "WRONG"
            print(f"{device:<10} {name:<9} {found[0]:9.1e} {found[1]:9.1e} {allowed:9.1e} {verdict}")
    print("(largest errors, relative to ABN in float64)\n")
    choice, reason = os.environ.get(native.VARIABLE), native.problem()
    if choice is not None:
        print(f"to do      {native.VARIABLE}={choice} is set: unset it for the fastest kernels")
    print(f"to do      {reason or 'nothing: the fastest implementation serves'}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
