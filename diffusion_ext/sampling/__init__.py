"""The sampling loop, its inputs, and the engines that run it."""

from .loop import ENGINES, SampleResult, sample

__all__ = ["ENGINES", "SampleResult", "sample"]
