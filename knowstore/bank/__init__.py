"""The expert bank: every passage's expert, encoded, in LanceDB."""

from knowstore.bank.bank import NAME, CacheInfo, ExpertBank, bank_names, drop_bank
from knowstore.bank.codec import decode, encode
from knowstore.bank.expert import EncodedExpert, StoredExpert
from knowstore.bank.fragments import write_fragment

__all__ = [
    "NAME",
    "CacheInfo",
    "EncodedExpert",
    "ExpertBank",
    "StoredExpert",
    "bank_names",
    "decode",
    "drop_bank",
    "encode",
    "write_fragment",
]
