"""From a question to scored passages: the retriever's vectors, the rerankers' scores, relevance."""

from knowstore.retrieval.cross_encoder import CrossEncoderReranker
from knowstore.retrieval.flag import FlagReranker
from knowstore.retrieval.joint import JointConfig, JointModel, JointReranker, load_joint
from knowstore.retrieval.late import LateReranker
from knowstore.retrieval.loading import calibration, load_reranker
from knowstore.retrieval.pairs import PairModel, load_pairs
from knowstore.retrieval.reranker import Reranker, RerankItem, RerankScore, relevance, word_relevance
from knowstore.retrieval.retriever import Retriever, gives_unit_vectors

__all__ = [
    "CrossEncoderReranker",
    "FlagReranker",
    "JointConfig",
    "JointModel",
    "JointReranker",
    "LateReranker",
    "PairModel",
    "RerankItem",
    "RerankScore",
    "Reranker",
    "Retriever",
    "calibration",
    "gives_unit_vectors",
    "load_joint",
    "load_pairs",
    "load_reranker",
    "relevance",
    "word_relevance",
]
