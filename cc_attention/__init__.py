"""Criss-cross attention: each position attends to its row and column (Huang et al., ICCV 2019)."""

from cc_attention import reference
from cc_attention.modules import CrissCrossAttention
from cc_attention.ops import attention_weights, backend, criss_cross_attention

__all__ = ["CrissCrossAttention", "attention_weights", "backend", "criss_cross_attention", "reference"]
