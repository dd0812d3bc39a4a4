"""Batch normalisation with its activation: ABN, In-Place ABN and synchronised In-Place ABN."""

from libs.modules import ABN, InPlaceABN, InPlaceABNSync

__all__ = ["ABN", "InPlaceABN", "InPlaceABNSync"]
