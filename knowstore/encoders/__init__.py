"""Text encoders whose embeddings stay as they were published, so that only trained layers are kept."""

from knowstore.encoders.base import BaseEncoder, load_base
from knowstore.encoders.description import read_description
from knowstore.encoders.tensors import int8_tensors, read_tensors

__all__ = ["BaseEncoder", "int8_tensors", "load_base", "read_description", "read_tensors"]
