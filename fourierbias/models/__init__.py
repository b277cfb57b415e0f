"""Models: the reference architectures, registered with timm on import, and what builds and loads them."""

from . import agent, cnn, eit, lsra, prs, vit

__all__ = ["agent", "cnn", "eit", "lsra", "prs", "vit"]
