"""Image sources: what a new version of an image is made from."""

from .base import Source

__all__ = ["Source"]
