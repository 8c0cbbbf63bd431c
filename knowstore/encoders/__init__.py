"""Text encoders whose embeddings stay as they were published, so that only trained layers are kept."""

from knowstore.encoders.base import BaseEncoder, load_base
from knowstore.encoders.tensors import read_tensors

__all__ = ["BaseEncoder", "load_base", "read_tensors"]
