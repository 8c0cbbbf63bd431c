"""Retrieval-augmented answers by LangChain on LanceDB, as its documentation shows them (extra `peers`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from langchain_classic.chains.question_answering.stuff_prompt import CHAT_PROMPT, PROMPT
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.language_models.llms import LLM
from langchain_core.messages import convert_to_openai_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_lancedb import LanceDB

from knowstore._loaded import LoadedModels
from knowstore.bench.peer_models import decoding, embed_passages, is_chat_model, short_prompt, whole_text
from knowstore.bench.systems import PromptName, SystemConfig, Told
from knowstore.experts import FrozenLLM
from knowstore.records import Passage


class _Embeddings(Embeddings):  # type: ignore[misc]  # the library is looked at only where it is installed
    """The retriever of the store, one vector a document."""

    def __init__(self, models: LoadedModels) -> None:
        self._models = models

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return embed_passages(self._models.retriever, texts)

    def embed_query(self, text: str) -> list[float]:
        [vector] = self._models.retriever.encode_questions([text]).tolist()
        return list(vector)


class _TransformersLLM(LLM):  # type: ignore[misc]
    """A causal language model and its tokenizer, asked as the text-generation pipeline of transformers asks them.

    The integration package for Hugging Face is of no use here: it refuses the huggingface-hub of today's transformers.
    """

    frozen: Any  # FrozenLLM
    settings: dict[str, Any]

    @property
    def _llm_type(self) -> str:
        return "transformers"

    def _call(self, prompt: str, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> str:
        llm: FrozenLLM = self.frozen
        inputs = llm.tokenizer(prompt, return_tensors="pt").to(llm.device)
        with torch.inference_mode():
            out = llm.model.generate(**inputs, **self.settings)
        written = out[0, inputs["input_ids"].shape[1] :]
        return str(llm.tokenizer.decode(written, skip_special_tokens=True))


class LangChainSystem:
    """A LanceDB vector store whose retriever is piped into a prompt and the model.

    The own prompt is that of `load_qa_chain` and `RetrievalQA`, their kind `stuff`, for a model with a chat template
    the one of messages. No splitter is used: every passage is one document, its title on a line before its text.
    """

    def __init__(self, config: SystemConfig) -> None:
        models = LoadedModels(config.models, cache_dir=config.cache_dir)
        self._store = LanceDB(_Embeddings(models), uri=str(config.folder))
        self._retriever = self._store.as_retriever(search_kwargs={"k": config.top_k})
        self._models, self._max_tokens = models, config.max_tokens
        self._chains: dict[PromptName, Runnable] = {}

    def add(self, passages: Sequence[Passage]) -> None:
        documents = [
            Document(whole_text(one), metadata={"passage_id": one.passage_id, "title": one.title}) for one in passages
        ]
        self._store.add_documents(documents)

    def ask(self, question: str, prompt: PromptName) -> Told:
        if prompt not in self._chains:
            self._chains[prompt] = self._chain(prompt)
        found = self._chains[prompt].invoke(question)
        ids = tuple(document.metadata["passage_id"] for document in found["documents"])
        return Told(found["answer"].strip(), ids)

    def _chain(self, prompt: PromptName) -> Runnable:
        """Question to {documents, question, answer}."""
        frozen = self._models.llm
        settings = {"max_new_tokens": self._max_tokens, **decoding(frozen, prompt)}
        llm = _TransformersLLM(frozen=frozen, settings=settings)
        if prompt == "short":
            asked = RunnableLambda(_short_prompt)
        else:
            is_chat = is_chat_model(frozen)
            written = CHAT_PROMPT | RunnableLambda(_templated(frozen)) if is_chat else PROMPT
            asked = RunnablePassthrough.assign(context=lambda found: _joined(found["documents"])) | written
        found = {"documents": self._retriever, "question": RunnablePassthrough()}
        return found | RunnablePassthrough.assign(answer=asked | llm | StrOutputParser())


def _templated(llm: FrozenLLM) -> Callable[[PromptValue], str]:
    """Messages as the model's chat template writes them, which `ChatHuggingFace` does."""
    return lambda prompt: str(
        llm.tokenizer.apply_chat_template(
            convert_to_openai_messages(prompt.to_messages()), tokenize=False, add_generation_prompt=True
        )
    )


def _joined(documents: Sequence[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def _short_prompt(found: dict[str, Any]) -> str:
    some = [(document.page_content, document.metadata["title"]) for document in found["documents"]]
    return short_prompt(some, found["question"])
