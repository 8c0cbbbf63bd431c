"""Retrieval-augmented answers by LlamaIndex on LanceDB, as its documentation shows them (extra `peers`)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from llama_index.core import Settings, VectorStoreIndex
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import TextNode
from llama_index.llms.huggingface import HuggingFaceLLM
from llama_index.vector_stores.lancedb import LanceDBVectorStore

from knowstore._loaded import LoadedModels
from knowstore.bench.peer_models import decoding, embed_passages, is_chat_model, short_prompt, whole_text
from knowstore.bench.systems import PromptName, SystemConfig, Told
from knowstore.records import Passage


class _Embedding(BaseEmbedding):  # type: ignore[misc]  # the library is looked at only where it is installed
    """The retriever of the store, one vector a node."""

    _models: LoadedModels = PrivateAttr()

    def __init__(self, models: LoadedModels) -> None:
        super().__init__(model_name=models.config.retriever)
        self._models = models

    def _get_query_embedding(self, query: str) -> list[float]:
        [vector] = self._models.retriever.encode_questions([query]).tolist()
        return list(vector)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return embed_passages(self._models.retriever, texts)


class LlamaIndexSystem:
    """A vector index on a LanceDB vector store, asked by its query engine.

    The own prompt and way of answering are the query engine's, in messages for a model with a chat template. No
    splitter is used: every passage is one node, its title on a line before its text. With the short prompt the index's
    retriever is asked, then the model.
    """

    def __init__(self, config: SystemConfig) -> None:
        logging.getLogger("llama_index").setLevel(logging.ERROR)  # it warns of every table that is not there yet
        self._models = LoadedModels(config.models, cache_dir=config.cache_dir)
        self._top_k, self._max_tokens = config.top_k, config.max_tokens
        store = LanceDBVectorStore(uri=str(config.folder), mode="create")
        self._index = VectorStoreIndex.from_vector_store(store, embed_model=_Embedding(self._models))
        self._llm: Any = None
        self._engine: Any = None

    def add(self, passages: Sequence[Passage]) -> None:
        unread = ["title"]  # it stands in the text already
        nodes = [
            TextNode(
                id_=one.passage_id, text=whole_text(one), metadata={"title": one.title},
                excluded_embed_metadata_keys=unread, excluded_llm_metadata_keys=unread,
            )
            for one in passages
        ]  # fmt: skip
        self._index.insert_nodes(nodes)

    def ask(self, question: str, prompt: PromptName) -> Told:
        if self._engine is None:
            self._load()
        if prompt == "own":
            response = self._engine.query(question)
            text, nodes = str(response), response.source_nodes
        else:
            nodes = self._retriever.retrieve(question)
            some = [(found.node.get_content(), found.node.metadata["title"]) for found in nodes]
            text = self._llm.complete(short_prompt(some, question)).text
        return Told(text.strip(), tuple(found.node.node_id for found in nodes))

    def _load(self) -> None:
        llm = self._models.llm
        Settings.tokenizer = llm.tokenizer.encode
        self._llm = self._wrapped("short")
        self._retriever = self._index.as_retriever(similarity_top_k=self._top_k)
        self._engine = self._index.as_query_engine(llm=self._wrapped("own"), similarity_top_k=self._top_k)

    def _wrapped(self, prompt: PromptName) -> HuggingFaceLLM:
        llm = self._models.llm
        return HuggingFaceLLM(
            model=llm.model, tokenizer=llm.tokenizer, max_new_tokens=self._max_tokens,
            generate_kwargs=decoding(llm, prompt), is_chat_model=prompt == "own" and is_chat_model(llm),
        )  # fmt: skip
