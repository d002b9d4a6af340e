"""The version of the installed package."""

from importlib import metadata

try:
    __version__ = metadata.version("diffusion_ext")
except metadata.PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0.0.0+source"
