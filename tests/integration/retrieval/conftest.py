"""Tiny random checkpoints, written to disk once a session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    GemmaConfig,
    GemmaForCausalLM,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaTokenizer,
)

WORDS = (
    "when",
    "was",
    "rome",
    "founded",
    "in",
    "753",
    "bc",
    ".",
    "lyon",
    "lies",
    "on",
    "the",
    "rhône",
    "!",
    "who",
    "is",
    "it",
    "?",
    "a",
    "city",
)
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_bert_tokenizer(folder: Path) -> int:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mean-pooling encoder without sentence-transformers files."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=save_bert_tokenizer(folder), **BERT)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with BGE's sentence-transformers files: first token, normalised, a query prompt."""
    folder = tmp_path_factory.mktemp("bge")
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=save_bert_tokenizer(folder), **BERT)).save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True})
    )
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": "who is "}}))
    return folder


@pytest.fixture(scope="session")
def dpr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A DPR pair with a projection to width 8."""
    question, context = tmp_path_factory.mktemp("dpr_question"), tmp_path_factory.mktemp("dpr_context")
    torch.manual_seed(2)
    config = DPRConfig(vocab_size=save_bert_tokenizer(question), projection_dim=8, **BERT)
    save_bert_tokenizer(context)
    DPRQuestionEncoder(config).save_pretrained(question)
    DPRContextEncoder(config).save_pretrained(context)
    return question, context


@pytest.fixture(scope="session")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cross_encoder")
    torch.manual_seed(3)
    config = BertConfig(vocab_size=save_bert_tokenizer(folder), num_labels=1, **BERT)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bge_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """XLM-RoBERTa with one label, the class of BAAI/bge-reranker-base."""
    folder = tmp_path_factory.mktemp("bge_reranker")
    torch.manual_seed(4)
    pieces = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")] + [("▁" + word, -2.0) for word in WORDS]
    tokenizer = XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], model_max_length=64)
    tokenizer.save_pretrained(folder)
    config = XLMRobertaConfig(vocab_size=len(tokenizer), num_labels=1, max_position_embeddings=66, **BERT)
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gemma_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma as a Yes/No reranker, the class of BAAI/bge-reranker-v2-gemma."""
    folder = tmp_path_factory.mktemp("gemma_reranker")
    torch.manual_seed(5)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "Yes", "No", "A", "B", ":", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = GemmaConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
    )
    GemmaForCausalLM(config).save_pretrained(folder)
    return folder
