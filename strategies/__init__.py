"""Placement on devices: ``Fit(strategy=...)`` takes a name, or an instance of a class here."""

from .base import Strategy
from .registry import STRATEGIES, get_strategy
from .single import Single

__all__ = ["STRATEGIES", "Single", "Strategy", "get_strategy"]
