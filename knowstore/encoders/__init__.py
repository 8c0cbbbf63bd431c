"""Text encoders whose embeddings stay as they were published, so that only trained layers are kept."""

from knowstore.encoders.base import BaseEncoder, load_base

__all__ = ["BaseEncoder", "load_base"]
