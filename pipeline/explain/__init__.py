"""Where a variant departs from its reference, by how much, and why."""

from pipeline.explain.divergence import Divergence, Layer, first_divergence

__all__ = ["Divergence", "Layer", "first_divergence"]
