"""The expert bank: every passage's expert, encoded, in LanceDB."""

from knowstore.bank.bank import NAME, ExpertBank, bank_names
from knowstore.bank.cache import CacheInfo
from knowstore.bank.codec import decode, encode
from knowstore.bank.expert import EncodedExpert, ExpertShape, StoredExpert
from knowstore.bank.fragments import write_fragment

__all__ = [
    "NAME",
    "CacheInfo",
    "EncodedExpert",
    "ExpertBank",
    "ExpertShape",
    "StoredExpert",
    "bank_names",
    "decode",
    "encode",
    "write_fragment",
]
