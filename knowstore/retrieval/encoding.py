"""What the retriever and the rerankers share in running an encoder over texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers

_PADDED_TOKENS_PER_BATCH = 8192


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back the progress bars and load reports of transformers; errors still show."""
    logging: Any = transformers.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()


def batches_by_length(lengths: Sequence[int], budget: int = _PADDED_TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Group the indices of texts, longest first, so that a padded batch holds at most `budget` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def usable_tokens(tokenizer: Any, config: Any, max_tokens: int) -> int:
    """The length that tokenizer, position embeddings and `max_tokens` all allow."""
    positions = getattr(config, "max_position_embeddings", max_tokens)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # positions are counted from behind the padding id
    return int(min(max_tokens, positions, tokenizer.model_max_length))


def readable(texts: Sequence[str]) -> list[str]:
    """Texts of the same lengths in which every lone surrogate, which tokenizers refuse, became "?"."""
    return [text.encode("utf-8", "replace").decode() for text in texts]
