"""The compiled kernels of In-Place ABN."""

from pathlib import Path

from cc_attention.native import Kernels

KERNELS = Kernels(Path(__file__).resolve().parent)
