"""The expert bank: every passage's expert, encoded, in LanceDB."""

from knowstore.bank.bank import CacheInfo, ExpertBank
from knowstore.bank.codec import decode, encode
from knowstore.bank.expert import EncodedExpert, StoredExpert

__all__ = ["CacheInfo", "EncodedExpert", "ExpertBank", "StoredExpert", "decode", "encode"]
