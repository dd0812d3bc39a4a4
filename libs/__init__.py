"""Batch normalisation with its activation: ABN, In-Place ABN and synchronised In-Place ABN."""

from libs.conversion import activation_of, fold, freeze, replace_by_batch_norm, to_batch_norm
from libs.modules import (
    ABN,
    InPlaceABN,
    InPlaceABNSync,
    abort,
    keep_statistics,
    norm_relu,
    prepare_to_compile,
)
from libs.ops import backend

__all__ = [
    "ABN",
    "InPlaceABN",
    "InPlaceABNSync",
    "abort",
    "activation_of",
    "backend",
    "fold",
    "freeze",
    "keep_statistics",
    "norm_relu",
    "prepare_to_compile",
    "replace_by_batch_norm",
    "to_batch_norm",
]
