"""fuse and unfuse: the fused ops inside a model that exists."""

from .walk import FuseReport, fuse, unfuse

__all__ = ["FuseReport", "fuse", "unfuse"]
