"""LangChain and LlamaIndex beside the store, on tiny models: the same vectors, passages and decoding, all measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from knowstore._answering import prompt_of
from knowstore._loaded import LoadedModels
from knowstore.bench import PeersConfig, can_plot, lacking_peers, peers, plot_peers, run_peers, systems
from knowstore.bench.systems import System, SystemConfig, SystemProcess
from knowstore.cli.app import app
from knowstore.config import GenerationConfig, ModelConfig
from knowstore.errors import ConfigError
from knowstore.experts import generate
from knowstore.records import Passage

needs_peers = pytest.mark.skipif(bool(lacking_peers()), reason="extra `peers` is not installed")
theirs = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LlamaIndex lists tables the old way
PASSAGES = [
    Passage(f"The tower is old. It is {number} metres high.", f"Town {number}" if number % 2 else "")
    for number in range(9)
]
QUESTION = "How high is the tower of Town 3?"


class HereProcess(SystemProcess):
    """The calls of a system's process, made in this one, which every other system of the run shares."""

    def __init__(self, name: str, make: Callable[[SystemConfig], System], config: SystemConfig) -> None:
        super().__init__(name, make, config)
        self.running: list[tuple[System, str]] = []

    def _result(self, call: Callable[..., Any], *arguments: object) -> Any:
        systems._running[:] = self.running
        measured = call(*arguments)
        self.running = list(systems._running)
        return measured


def written(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return written(tmp_path / "corpus.jsonl", [{"title": one.title, "text": one.text} for one in PASSAGES])


@pytest.fixture
def questions(villages: Callable[[int], Path]) -> Path:
    return villages(6)


@needs_peers
@theirs
@pytest.mark.parametrize("make", [systems.langchain, systems.llama_index])
def test_a_peer_reads_what_is_nearest_and_decodes_as_the_store_does(
    make: Callable[[SystemConfig], System], tiny_models: ModelConfig, tmp_path: Path
) -> None:
    system = make(SystemConfig(tmp_path / "peer", tiny_models, top_k=2, max_tokens=6))
    system.add(PASSAGES[:5])
    system.add(PASSAGES[5:])
    told = system.ask(QUESTION, "short")

    models = LoadedModels(tiny_models)
    vectors = np.stack([one for one, _ in models.retriever.encode_passages(PASSAGES, [()] * len(PASSAGES))])
    [question] = models.retriever.encode_questions([QUESTION])
    nearest = [PASSAGES[index] for index in np.argsort(-(vectors @ question))[:2]]
    assert list(told.passage_ids) == [one.passage_id for one in nearest]
    prompt = prompt_of(QUESTION, nearest)
    [expected] = generate(models.llm, [prompt], None, 0, GenerationConfig(max_tokens=6))
    assert told.text == expected.text != ""

    assert system.ask(QUESTION, "own").passage_ids == told.passage_ids


@needs_peers
@theirs
@pytest.mark.parametrize("make", [systems.langchain, systems.llama_index])
def test_a_peers_own_prompt_follows_the_chat_template(
    make: Callable[[SystemConfig], System],
    tiny_models: ModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(tiny_models.llm, tmp_path / "chat")
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %} [answer]"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template, "utf-8")
    models = replace(tiny_models, llm=str(tmp_path / "chat"))
    prompts: list[str] = []
    asked = PreTrainedTokenizerFast.__call__

    def noted(tokenizer: object, text: str, *arguments: object, **options: object) -> object:
        prompts.append(text)
        return asked(tokenizer, text, *arguments, **options)

    system = make(SystemConfig(tmp_path / "peer", models, top_k=1, max_tokens=2))
    system.add(PASSAGES[:1])
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", noted)
    system.ask(QUESTION, "own")
    assert re.search(rf"^\[system\].*\[user\].*{re.escape(QUESTION)}.*\[answer\]$", prompts[-1], re.DOTALL)
    assert PASSAGES[0].text in prompts[-1]
    system.ask(QUESTION, "short")
    assert prompts[-1] == prompt_of(QUESTION, PASSAGES[:1]).before + prompt_of(QUESTION, ()).question


@needs_peers
@theirs
def test_every_system_is_asked_every_question(
    tiny_models: ModelConfig, questions: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "SystemProcess", HereProcess)
    config = PeersConfig(limit=2, n_passages=15, n_parts=2, top_k=15, max_tokens=3)
    found = run_peers(questions, [corpus], models=tiny_models, config=config, cache_dir=tmp_path)
    rows, ingest, ratios = found["rows"], found["ingest"], found["ratios"]
    assert isinstance(rows, list)
    assert isinstance(ingest, list)
    assert isinstance(ratios, list)
    assert [(row["method"], row["prompt"], row["n"]) for row in rows] == [(*way, 2) for way in peers.WAYS]
    peer_rows = [row for row in rows if row["method"] in ("langchain", "llamaindex")]
    assert [row["given"] for row in peer_rows] == [1.0] * 4  # all passages are read
    assert all(row["answer_s"] > 0 and row["em_ci"][0] <= row["em"] <= row["em_ci"][1] for row in rows)
    assert [(row["method"], row["passages"]) for row in ingest] == [("experts", 7), ("langchain", 7), ("llamaindex", 7)]
    assert all(row["size_bytes"] > 5000 for row in ingest)
    assert {row["name"] for row in ratios} >= {"ingest_experts_over_langchain", "answer_llamaindex_own_over_experts"}
    if not can_plot():
        pytest.skip("extra `plots` is not installed")
    plot_peers(found, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_gives_what_its_system_gave_and_its_errors_and_its_end(
    tiny_models: ModelConfig, tmp_path: Path
) -> None:
    config = SystemConfig(tmp_path / "store", tiny_models, top_k=2, max_tokens=3, cache_dir=tmp_path)
    with SystemProcess("experts", systems.rag_zero_shot, config) as process:
        process.start()
        added = process.add(PASSAGES)
        assert added.seconds > 0
        assert added.peak_bytes is None or added.peak_bytes > 10_000_000
        told = process.ask(QUESTION, "short").told
        assert told is not None
        assert set(told.passage_ids) <= {one.passage_id for one in PASSAGES}
        with pytest.raises(ConfigError) as refused:
            process.ask(" ", "short")
        assert refused.value.fix
        [worker] = process._pool._processes
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(ConfigError, match="the process of experts ended"):
            process.ask(QUESTION, "short")


def test_without_the_extra_it_says_what_to_install(
    questions: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name.startswith("llama_index") else object())
    shown = CliRunner().invoke(app, ["bench", "peers", "--data", str(questions), "--corpus", str(corpus)])
    assert shown.exit_code == 1
    with pytest.raises(ConfigError, match=r"llama_index\.core, llama_index\.llms\.huggingface") as refused:
        run_peers(questions, [corpus])
    assert "knowstore[peers]" in refused.value.fix


def test_questions_on_one_text_have_the_passage_that_is_added(corpus: Path, tmp_path: Path) -> None:
    rows = [
        {"question": f"{title}?", "answers": ["here"], "passage": {"title": title, "text": text}}
        for title, text in (("Rome", "It lies here."), ("The city of Rome", "It  lies here."))
    ]
    asked, passages = peers._drawn(
        written(tmp_path / "twins.jsonl", rows), [corpus], PeersConfig(n_passages=10, n_parts=1)
    )
    assert len(passages) == 10
    assert {one.passage.passage_id for one in asked} <= {one.passage_id for one in passages}


@pytest.mark.parametrize("n_passages", [12, 16])
def test_there_must_be_as_many_passages_as_are_added(
    n_passages: int, questions: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "lacking_peers", list)
    with pytest.raises(ConfigError, match="there are 15 and 13 are needed"):
        run_peers(questions, [corpus], config=PeersConfig(limit=6, n_passages=n_passages))
