"""Tiny random checkpoints, written to disk once a session, and a PostgreSQL server of our own; nothing heavy is
imported until one is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from knowstore.prompts import answer_target, question_prompt
from tests.postgresql import NoServerError, postgresql_server
from tests.s3 import BUCKET, NoS3Error, s3_server

if TYPE_CHECKING:
    from knowstore.config import ModelConfig
    from knowstore.experts import FrozenLLM, PassageInput

TITLE, TEXT = "Rome", "Rome was founded in 753 BC. It lies on the river Tiber! Who founded it? Romulus did."
QUESTIONS = (
    ("When was Rome founded?", "in 753 BC"),
    ("Where does the river Rhône end?", "in the sea"),
    ("Who was the first king of Rome?", "Romulus"),
)
SENTENCES = (
    TEXT,
    "Lyon lies on the Rhône and the Saône; who founded it? Romulus did not.",
    *(question_prompt(question) + answer_target(answer) for question, answer in QUESTIONS),
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
N_WORD_PIECES = 160
D, N_LAYERS, LAYER = 32, 3, 1


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Tiny matrices are slower on many threads, and sums vary with their number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def save_tokenizer() -> Callable[[Path], int]:
    """A function that writes a byte-level BPE tokenizer like SmolLM2's to a folder and gives its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)

    def save(folder: Path) -> int:
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            additional_special_tokens=list(CONTROL_TOKENS),
        ).save_pretrained(folder)
        return int(tokenizer.get_vocab_size())

    return save


@pytest.fixture(scope="session")
def tiny_llm_dir(
    tmp_path_factory: pytest.TempPathFactory, save_tokenizer: Callable[[Path], int], one_thread: None
) -> Path:
    """A random Llama of three blocks and width 32, with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llm")
    n_tokens = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tiny_llm_dir: Path) -> FrozenLLM:
    """The tiny LLM, loaded."""
    from knowstore.experts import load_llm

    return load_llm(tiny_llm_dir)


@pytest.fixture(scope="session")
def tiny_retriever_dir(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A random BERT of width 32 with a WordPiece tokenizer: a mean-pooling encoder like MiniLM."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_retriever")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=N_WORD_PIECES, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=D,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def passage() -> PassageInput:
    """A passage of four sentences."""
    from knowstore.experts import PassageInput

    return PassageInput(TITLE, TEXT, sentence_spans(TEXT))


def sentence_spans(text: str) -> tuple[tuple[int, int], ...]:
    """Spans that end behind each of `.!?`; enough for texts without abbreviations."""
    ends = [position + 1 for position, letter in enumerate(text) if letter in ".!?"]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    starts = [0, *(end + 1 for end in ends[:-1])]
    return tuple(zip(starts, ends, strict=True))


@pytest.fixture(scope="session")
def tiny_hypernetwork_dir(
    tmp_path_factory: pytest.TempPathFactory, tiny_llm: FrozenLLM, tiny_retriever_dir: Path
) -> Path:
    """A small `tokens` hypernetwork after its analytic start, which counts as trained."""
    import torch

    from knowstore.encoders import load_base
    from knowstore.experts import TokensConfig, TokensHypernetwork
    from knowstore.training.start import analytic_start

    torch.manual_seed(2)
    base = load_base(tiny_retriever_dir)
    config = TokensConfig(
        width=D,
        layer=LAYER,
        encoder_width=base.width,
        base=str(tiny_retriever_dir),
        base_digest=base.digest,
        code_width=8,
        static_rank=4,
        query_from=0,
        query_rank=4,
        max_tokens=128,
    )
    hypernetwork = TokensHypernetwork(config, base).eval()
    prompts = [
        tiny_llm.prompt_ids(question_prompt(question)) + tiny_llm.prompt_ids(answer_target(answer), is_start=False)
        for question, answer in QUESTIONS
    ]
    analytic_start(hypernetwork, tiny_llm, prompts)
    with torch.no_grad():  # what starts at zero would hide mistakes in what it multiplies
        for name, parameter in hypernetwork.named_parameters():
            if not parameter.any() and not name.startswith("encoder."):
                parameter.normal_(std=0.05)
    hypernetwork.config = replace(config, trained_steps=1, notes="for tests")
    folder = tmp_path_factory.mktemp("tiny_hypernetwork")
    hypernetwork.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reader_dir(tmp_path_factory: pytest.TempPathFactory, tiny_llm: FrozenLLM) -> Path:
    """A small random reader, which counts as trained."""
    import torch

    from knowstore.experts import ReaderConfig, ReaderHypernetwork

    torch.manual_seed(4)
    sizes = {"static_rank": 4, "query_from": 0, "query_rank": 4, "upper_rank": 2}
    reader = ReaderHypernetwork(
        ReaderConfig(width=D, layer=LAYER, n_blocks=tiny_llm.n_layers, trained_steps=1, **sizes)
    )
    with torch.no_grad():  # what starts at zero would hide mistakes in what it multiplies
        for parameter in reader.parameters():
            parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("tiny_reader")
    reader.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pooled_dir(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A small random `pooled` hypernetwork, which counts as trained."""
    import torch

    from knowstore.experts import PooledConfig, PooledHypernetwork

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("tiny_pooled")
    PooledHypernetwork(PooledConfig(width=D, layer=LAYER, trained_steps=1, rank=3, bottleneck=5)).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_models(tiny_llm_dir: Path, tiny_retriever_dir: Path, tiny_hypernetwork_dir: Path) -> ModelConfig:
    """Settings that make a store of the tiny models, on the CPU in float32."""
    from knowstore.config import ModelConfig

    return ModelConfig(
        llm=str(tiny_llm_dir),
        retriever=str(tiny_retriever_dir),
        reranker="late",
        hypernetwork=str(tiny_hypernetwork_dir),
        reader="none",
        dtype="float32",
        device="cpu",
    )


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The bucket of an S3 server of our own, with what clients need in the environment."""
    with ExitStack() as stack:
        try:
            environment = stack.enter_context(s3_server())
        except NoS3Error as error:
            pytest.skip(f"S3: {error}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """The URL of a server of our own."""
    pytest.importorskip("psycopg", reason="PostgreSQL: psycopg is not installed")
    with ExitStack() as stack:
        try:
            url = stack.enter_context(postgresql_server())
        except NoServerError as error:
            pytest.skip(f"PostgreSQL: {error}")
        yield url
