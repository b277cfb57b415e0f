"""The trainer: data, recipe, loop; one recipe for every reference network."""

from .recipe import Recipe
from .trainer import Result, train

__all__ = ["Recipe", "Result", "train"]
