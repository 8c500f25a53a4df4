"""The version of stratagem that is installed."""

from importlib import metadata

try:
    __version__ = metadata.version("stratagem")
except metadata.PackageNotFoundError:  # a checkout on the path, which was never installed
    __version__ = "0+unknown"
