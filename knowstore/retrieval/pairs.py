"""Published rerankers that read a question and a passage as a pair, as models that can be trained.

    classifier   a sequence classifier with one label (`BAAI/bge-reranker-base`, MiniLM cross-encoders)
    yes          a causal LM, scored by its logit of "Yes" (`BAAI/bge-reranker-v2-gemma`)

Inputs are those with which `CrossEncoderReranker` and FlagEmbedding score, so that what is trained is what is served.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from knowstore.errors import RetrievalError
from knowstore.retrieval.encoding import quiet_transformers, readable, usable_tokens

Pair = tuple[str, str]
"""A question and a text."""

_PROMPT = (
    "Given a query A and a passage B, determine whether the passage contains an answer to the query by providing a "
    "prediction of either 'Yes' or 'No'."
)
_FIX = "give a directory or hub id such as `BAAI/bge-reranker-base` or `BAAI/bge-reranker-v2-gemma`"


class PairModel(ABC):
    """A reranker's model and tokenizer; `logits` are differentiable.

    Args:
        model: in float32, to be trained.
        tokenizer: its tokenizer.
        max_tokens: the length of question and text together; what is longer loses the end of its text.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self._saved_dtype = model.config.dtype
        self._lora: Any = None

    @abstractmethod
    def logits(self, pairs: Sequence[Pair]) -> Tensor:
        """The logits (B,) of B pairs."""

    def use_lora(self, rank: int) -> None:
        """Train updates of a rank to all linear layers (LoRA) in the place of the weights.

        Raises:
            RetrievalError: peft is not installed.
        """
        try:
            import peft
        except ImportError as error:
            raise RetrievalError(
                f"updates of rank {rank} need peft: {error}", kept="nothing was trained",
                fix="pip install 'knowstore[rerank]', or train all weights",
            ) from error  # fmt: skip
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
        self._lora = peft.LoraModel(self.model, config, "default")
        for name, parameter in self.model.named_parameters():
            if {"score", "classifier"} & set(name.split(".")):  # a classifier's own head is trained as it is
                parameter.requires_grad_(True)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> None:
        """Write a checkpoint of the class it was read from, with what LoRA trained added to its weights.

        Args:
            dtype: of its floating weights; None for that of the checkpoint that it was read from. The model in memory
                is not trained further after this.
        """
        model = self.model if self._lora is None else self._lora.merge_and_unload()
        with quiet_transformers():
            model.to(dtype or self._saved_dtype).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


class ClassifierPairs(PairModel):
    """A sequence classifier with one label."""

    def logits(self, pairs: Sequence[Pair]) -> Tensor:
        questions, texts = zip(*pairs, strict=True)
        batch = self.tokenizer(
            readable(questions), readable(texts), truncation="longest_first", max_length=self.max_tokens,
            split_special_tokens=True, padding=True, return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        found: Tensor = self.model(**batch).logits[:, 0]
        return found.float()


class YesPairs(PairModel):
    """A causal LM that is asked whether the text answers the question; the logit of its "Yes"."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int) -> None:
        super().__init__(model, tokenizer, max_tokens)
        self._yes = self._ids("Yes")[0]
        self._separator, self._prompt = self._ids("\n"), self._ids(_PROMPT)
        bos = tokenizer.bos_token_id
        self._start = [] if bos is None or bos == tokenizer.pad_token_id else [bos]

    def logits(self, pairs: Sequence[Pair]) -> Tensor:
        rows = [self._row(question, text) for question, text in pairs]
        width = max(map(len, rows))  # padded on the left, so that all end together
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        found: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
        return found[:, -1, self._yes].float()

    def _row(self, question: str, text: str) -> list[int]:
        """The pair's token ids; a long question leaves room for a text, a long text loses its end."""
        asked, answered = readable([question, text])
        first = self._start + self._ids(f"A: {asked}")[: self.max_tokens * 3 // 4]
        second = self._separator + self._ids(f"B: {answered}")[: self.max_tokens]
        room = self.max_tokens + len(self._separator) + len(self._prompt) - len(first)
        return first + second[:room] + self._separator + self._prompt

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def load_pairs(path: Path, device: str = "cpu", *, max_tokens: int = 256) -> PairModel:
    """Load a reranker to be trained.

    Args:
        path: directory of the checkpoint.
        device: where it is trained.
        max_tokens: the length of question and text together.

    Raises:
        RetrievalError: neither a sequence classifier with one label nor a causal LM.
    """
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(str(path))
            architecture = (config.architectures or ["no architecture"])[0]
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
            if architecture.endswith("ForSequenceClassification") and config.num_labels == 1:
                model = AutoModelForSequenceClassification.from_pretrained(str(path), dtype="auto")
                kind: type[PairModel] = ClassifierPairs
                max_tokens = usable_tokens(tokenizer, model.config, max_tokens)
            elif architecture.endswith("ForCausalLM"):
                model = AutoModelForCausalLM.from_pretrained(str(path), dtype="auto")
                kind = YesPairs
            else:
                raise ValueError(f"its architecture is {architecture} with {config.num_labels} labels")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RetrievalError(
            f"{path} cannot be read as a reranker of pairs: {error}", kept="nothing was trained", fix=_FIX
        ) from error
    loaded = kind(model, tokenizer, max_tokens)
    loaded.model.float().to(device)
    return loaded
