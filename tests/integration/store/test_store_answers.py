"""Asking: filters, weights, modes, batches, mounting, codecs, and models that do not fit."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from knowstore import _answering
from knowstore.bank import ExpertBank, StoredExpert
from knowstore.config import BankConfig, Codec, Filters, GenerationConfig, Index, ModelConfig, RetrievalConfig, Search
from knowstore.encoders import load_base
from knowstore.errors import (
    ConfigError,
    FilterError,
    HypernetworkError,
    KnowledgeStoreError,
    MountError,
    PassageError,
    UnknownBatchError,
    UnknownPassageError,
)
from knowstore.experts import (
    FrozenLLM,
    Prompt,
    ReaderConfig,
    ReaderHypernetwork,
    TokensHypernetwork,
    expert_output,
    generate,
    load_hypernetwork,
)
from knowstore.prompts import passages_prompt, question_prompt
from knowstore.records import Answer, Mode, MountedExpert, Passage
from knowstore.retrieval import JointConfig, JointModel, JointReranker, relevance
from knowstore.retrieval.joint import PASSAGE_TEMPERATURE
from knowstore.store import KnowledgeStore

Open = Callable[..., KnowledgeStore]

ROME, LYON = "When was Rome founded?", "Where does Lyon lie?"
QUESTIONS = [ROME, LYON, "Who was the first king of Rome?", "Quito?", "Where does the river Rhône end?"]


@pytest.fixture
def store(open_store: Open, facts: list[Passage]) -> KnowledgeStore:
    """All facts, in two batches, kept exactly."""
    opened = open_store(bank=BankConfig(codec="float32"))
    opened.add(facts[:3])
    opened.add(facts[3:])
    return opened


def _logits(llm: FrozenLLM, question: str = ROME) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = llm.model(torch.tensor([llm.prompt_ids(question_prompt(question))])).logits
    return logits


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(source="italy"), {"Rome", "Romulus"}),
        (Filters(source="*"), {"Rome", "Romulus", "Lyon", "Rhône", "Oslo", "Quito"}),
        (Filters(title="R*"), {"Rome", "Romulus", "Rhône"}),
        (Filters(title="Rome"), {"Rome"}),
        (Filters(batch_id=2), {"Rhône", "Oslo", "Quito"}),
        (Filters(date_from="2020-06", date_to="2021"), {"Romulus", "Lyon"}),
        (Filters(date_from="2023"), {"Quito"}),
        (Filters(source="france", date_to="2021-12-31"), {"Lyon"}),
        (Filters(source="it's"), set()),
        (Filters(title="' OR 1=1 --"), set()),
    ],
)
def test_filters_limit_what_is_found_and_mounted(filters: Filters, expected: set[str], store: KnowledgeStore) -> None:
    assert {hit.title for hit in store.retrieve(ROME, filters=filters)} == expected
    answer = store.ask(ROME, filters=filters)
    assert {one.title for one in answer.experts} <= expected
    assert answer.is_null == (not expected)


def test_a_filter_that_cannot_be_read_is_refused(store: KnowledgeStore) -> None:
    with pytest.raises(FilterError):
        store.ask(ROME, filters=Filters(date_from="yesterday"))


def test_an_answer_says_which_experts_with_which_weights_from_which_batch(
    store: KnowledgeStore, facts: list[Passage]
) -> None:
    answer = store.ask(ROME)
    assert [one.passage_id for one in answer.experts] == [hit.passage_id for hit in answer.hits[:4]]
    assert list(answer.hits) == sorted(answer.hits, key=lambda hit: -hit.score)
    assert [one.weight for one in answer.experts] == pytest.approx(relevance([h.score for h in answer.hits[:4]], 1.0))
    assert sum(one.weight for one in answer.experts) == pytest.approx(1, abs=1e-6)
    assert all(sum(one.segment_weights) == pytest.approx(one.weight) for one in answer.experts)
    batches = {passage.passage_id: 1 if passage in facts[:3] else 2 for passage in facts}
    assert all(one.batch_id == batches[one.passage_id] for one in answer.experts)
    assert {"embed_question", "search", "rerank", "generate", "total"} <= answer.timings_s.keys()


def test_temperature_and_top_k_shape_the_weights(store: KnowledgeStore, open_store: Open) -> None:
    def weights(top_k: int, temperature: float) -> list[float]:
        settings = RetrievalConfig(top_k=top_k, temperature=temperature)
        return [one.weight for one in open_store(retrieval=settings).ask(ROME).experts]

    assert weights(1, 1.0) == [1.0]
    cold, warm, hot = weights(4, 0.01), weights(4, 1.0), weights(4, 1000.0)
    assert cold[0] > warm[0] > hot[0]
    assert hot == pytest.approx([0.25] * 4, abs=0.01)
    assert all(sum(each) == pytest.approx(1, abs=1e-6) for each in (cold, warm, hot))


def test_a_joint_reranker_weighs_sentences_at_its_own_temperature_and_leaves_passages_to_the_late_one(
    store: KnowledgeStore, open_store: Open, tiny_models: ModelConfig, tiny_retriever_dir: Path, tmp_path: Path
) -> None:
    base = load_base(tiny_retriever_dir)
    torch.manual_seed(0)
    config = JointConfig(base.digest, str(tiny_retriever_dir), temperature=4.0)
    model = JointModel(base)
    for name, settings in (("joint", config), ("untempered", replace(config, temperature=1.0))):
        JointReranker(model, settings).save(tmp_path / name)
    models = replace(tiny_models, reranker=str(tmp_path / "joint"))
    answer = open_store(models=models, retrieval=RetrievalConfig(temperature=0.5)).ask(ROME)
    untempered = open_store(models=replace(models, reranker=str(tmp_path / "untempered"))).ask(ROME)
    late = store.ask(ROME)
    assert [hit.score for hit in answer.hits] == [hit.score / PASSAGE_TEMPERATURE for hit in late.hits]
    assert [hit.segment_scores for hit in answer.hits] != [hit.segment_scores for hit in late.hits]
    kept = answer.hits[:4]
    assert [one.weight for one in answer.experts] == pytest.approx(relevance([hit.score for hit in kept], 0.5))
    for one, hit in zip(answer.experts, kept, strict=True):
        shares = [one.weight * share for share in relevance(hit.segment_scores, 0.5)]
        assert list(one.segment_weights) == pytest.approx(shares)
    assert kept[0].word_scores
    for hit, plain in zip(kept, untempered.hits, strict=False):
        if not hit.word_scores:  # of next to no relevance at this temperature
            continue
        assert relevance(hit.segment_scores) == pytest.approx(relevance(plain.segment_scores, 4.0))
    assert any(len(hit.segment_scores) > 1 for hit in kept)


def test_the_grain_says_what_is_weighed_within_a_passage(
    store: KnowledgeStore, open_store: Open, tiny_models: ModelConfig, tiny_retriever_dir: Path, tmp_path: Path
) -> None:
    base = load_base(tiny_retriever_dir)
    torch.manual_seed(0)
    JointReranker(JointModel(base), JointConfig(base.digest, str(tiny_retriever_dir))).save(tmp_path / "joint")
    models = replace(tiny_models, reranker=str(tmp_path / "joint"))
    weights: dict[str, torch.Tensor] = {}
    for grain in ("words", "sentences", "passages"):
        opened = open_store(models=models, retrieval=RetrievalConfig(grain=grain, top_k=1))  # type: ignore[arg-type]
        [one] = opened.ask(ROME).experts
        assert bool(one.word_weights) == (grain == "words")
        reader = opened._reader()
        assert reader is not None
        mounted = reader.combine([[one]])
        assert mounted.neuron_weights is not None
        weights[grain] = mounted.neuron_weights[0]
    assert weights["passages"].tolist() == [1.0] * len(weights["passages"])
    assert len(set(weights["sentences"].tolist())) == len(one.segments) > 1
    assert weights["words"].max() == pytest.approx(float(weights["sentences"].max()), rel=1e-5)
    assert len(set(weights["words"].tolist())) > len(one.segments)


@pytest.mark.parametrize("codec", ["latent", "float32"])
def test_of_several_passages_the_words_that_weigh_something_are_mounted_and_no_others(
    codec: Codec, open_store: Open, facts: list[Passage], tiny_models: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(models=tiny_models, bank=BankConfig(codec=codec), retrieval=RetrievalConfig(top_k=3))
    store.add(facts)
    first, second = (store.ask(question).experts for question in (ROME, LYON))
    assert {one.passage_id for one in first} & {one.passage_id for one in second}
    heavy = [_with_word_weights(first, 1), _with_word_weights(second, 2)]
    reader = store._reader()
    assert reader is not None
    mounted = reader.combine(heavy)
    monkeypatch.setattr("knowstore.experts.expert._LEAST", 0.0)
    whole = reader.combine(heavy)
    assert mounted.neuron_weights is not None
    assert whole.neuron_weights is not None
    assert mounted.neuron_weights.shape[1] < whole.neuron_weights.shape[1] / 2
    x = torch.randn(2, 4, mounted.width)
    expected = expert_output(whole, x)
    assert (expert_output(mounted, x) - expected).norm() < 5e-3 * expected.norm()
    assert not torch.equal(expected[0], expert_output(reader.combine(heavy[::-1]), x)[0])


def test_passages_of_next_to_no_relevance_are_neither_read_nor_made_experts_of(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, tiny_retriever_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = load_base(tiny_retriever_dir)
    JointReranker(JointModel(base), JointConfig(base.digest, str(tiny_retriever_dir))).save(tmp_path / "joint")
    models, got = replace(tiny_models, reranker=str(tmp_path / "joint")), list[int]()
    get = ExpertBank.get

    def noted(bank: ExpertBank, ids: Sequence[str], **more: Any) -> dict[str, StoredExpert]:
        got.append(len(ids))
        return get(bank, ids, **more)

    monkeypatch.setattr(ExpertBank, "get", noted)
    open_store(models=models).add(facts)
    for temperature, n_used in ((1e3, 3), (1e-3, 1)):
        store = open_store(models=models, retrieval=RetrievalConfig(top_k=3, temperature=temperature))
        got.clear()
        answer = store.ask(ROME)
        assert len(answer.experts) == 3
        assert [bool(one.word_weights) for one in answer.experts].count(True) == n_used
        assert got == [n_used]
        assert not any(one.word_weights for one in store.ask(ROME, mode="rag").experts)


def _with_word_weights(experts: Sequence[MountedExpert], heavy: int) -> list[MountedExpert]:
    """The same passages, in each of which the word that is `heavy` weighs nearly everything."""
    return [
        replace(one, word_weights=tuple(
            (first, first + 3, 1.0 if place == heavy else 1e-6)
            for place, first in enumerate(range(0, len(one.text) - 3, 3))
        ))
        for one in experts
    ]  # fmt: skip


def test_below_the_threshold_nothing_is_mounted_and_logits_are_those_of_the_bare_model(
    store: KnowledgeStore, open_store: Open
) -> None:
    score = store.ask(ROME).hits[0].score
    bare = _logits(store.models.llm)
    with store.mount(ROME) as llm:
        assert not torch.equal(_logits(llm), bare)
    strict = open_store(retrieval=RetrievalConfig(null_threshold=score + 1e-3))
    with strict.mount(ROME) as llm:
        assert torch.equal(_logits(llm), bare)
    answer = strict.ask(ROME)
    assert (answer.is_null, answer.experts, len(answer.hits)) == (True, (), 6)
    lenient = open_store(retrieval=RetrievalConfig(null_threshold=score - 1e-3)).ask(ROME)
    assert (lenient.is_null, lenient.text) == (False, store.ask(ROME).text)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each generation was asked: its prompts, experts and where they act."""
    import knowstore.experts as experts
    from knowstore.experts import generation

    asked: list[dict[str, Any]] = []
    generate, mount = experts.generate, experts.mount

    def noted(llm: FrozenLLM, prompts: Any, mounted: Any, *arguments: Any, **options: Any) -> Any:
        asked.append({"prompts": prompts, "experts": mounted, "starts": None})
        return generate(llm, prompts, mounted, *arguments, **options)

    def mounted(*arguments: Any, **options: Any) -> Any:
        asked[-1]["starts"] = options["starts"]
        return mount(*arguments, **options)

    monkeypatch.setattr(experts, "generate", noted)
    monkeypatch.setattr(generation, "mount", mounted)
    return asked


@pytest.mark.parametrize("mode", ["experts", "rag", "hybrid"])
def test_modes_differ_in_what_is_in_the_prompt_and_what_is_mounted(
    mode: Mode, store: KnowledgeStore, prompts: list[dict[str, Any]]
) -> None:
    answer = store.ask(ROME, mode=mode)
    (asked,) = prompts
    assert answer.n_read == {"experts": 0, "rag": 4, "hybrid": 1}[mode]
    before = passages_prompt([(one.title, one.text) for one in answer.experts[: answer.n_read or 4]])
    assert (asked["prompts"][0].before, asked["prompts"][0].question) == (
        "" if mode == "experts" else before,
        question_prompt(ROME),
    )
    assert (asked["experts"] is None) == (mode == "rag")
    n_before = len(store.models.llm.prompt_ids(before))
    assert asked["starts"] == ([n_before] if mode == "hybrid" else None)
    assert answer.mode == mode


@pytest.mark.parametrize("n_read", [2, 9, None])
def test_both_mounted_and_read_reads_as_many_as_are_asked_for(
    n_read: int | None, open_store: Open, store: KnowledgeStore, prompts: list[dict[str, Any]]
) -> None:
    answer = open_store(retrieval=RetrievalConfig(n_read=n_read)).ask(ROME, mode="hybrid")
    assert answer.n_read == (2 if n_read == 2 else 4) <= len(answer.experts)
    read = answer.experts[: answer.n_read]
    assert prompts[0]["prompts"][0].before == passages_prompt([(one.title, one.text) for one in read])


def test_where_all_lets_experts_act_on_the_passages_too(
    store: KnowledgeStore, open_store: Open, prompts: list[dict[str, Any]]
) -> None:
    open_store(generation=GenerationConfig(where="all")).ask(ROME, mode="hybrid")
    assert prompts[0]["starts"] is None


@pytest.mark.parametrize("mode", ["experts", "rag", "hybrid"])
@pytest.mark.parametrize("has_threshold", [False, True])
def test_many_questions_get_the_answers_of_one_by_one(
    mode: Mode, has_threshold: bool, store: KnowledgeStore, open_store: Open
) -> None:
    scores = sorted(store.retrieve(question)[0].score for question in QUESTIONS)
    settings = RetrievalConfig(null_threshold=scores[2] if has_threshold else None)
    asked = open_store(retrieval=settings)
    alone = [asked.ask(question, mode=mode) for question in QUESTIONS]
    many = asked.ask_many(QUESTIONS, mode=mode, batch_size=3)
    assert [_content(one) for one in many] == [_content(one) for one in alone]
    assert sum(one.is_null for one in many) == (2 if has_threshold else 0)
    assert asked.ask_many([]) == []


def test_answers_to_many_questions_can_do_without_what_was_found(store: KnowledgeStore) -> None:
    whole = store.ask_many(QUESTIONS, batch_size=3)
    short = store.ask_many(QUESTIONS, batch_size=3, has_details=False)
    assert [_told(one) for one in short] == [_told(one) for one in whole]
    assert all(one.hits == () and not any(expert.text for expert in one.experts) for one in short)
    assert max(len(pickle.dumps(one)) for one in short) < min(len(pickle.dumps(one)) for one in whole)


def test_only_so_many_questions_wait_with_what_was_found_for_them(
    store: KnowledgeStore, prompts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [store.ask(question) for question in QUESTIONS]
    prompts.clear()
    monkeypatch.setattr(_answering, "ASKED_AT_ONCE", 2)
    many = store.ask_many(QUESTIONS, batch_size=8)
    assert [_content(one) for one in many] == [_content(one) for one in alone]
    assert max(len(one["prompts"]) for one in prompts) == 2


def _told(answer: Answer) -> tuple[object, ...]:
    experts = [(one.passage_id, one.weight, one.score, one.batch_id, one.source, one.title) for one in answer.experts]
    return answer.question, answer.text, experts, answer.is_null, answer.notes, answer.n_read


def test_prompts_of_similar_length_are_answered_together(store: KnowledgeStore, prompts: list[dict[str, Any]]) -> None:
    long = [question + " And who says so, and where, and since when?" for question in QUESTIONS[:2]]
    asked = [long[0], QUESTIONS[2], long[1], QUESTIONS[3]]
    assert [one.question for one in store.ask_many(asked, batch_size=2)] == asked
    together = [{prompt.question for prompt in one["prompts"]} for one in prompts]
    assert together == [{question_prompt(one) for one in some} for some in (long, QUESTIONS[2:4])]


def test_the_experts_of_a_batch_are_read_at_once(store: KnowledgeStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[str]] = []
    get = ExpertBank.get

    def noted(self: ExpertBank, ids: Sequence[str]) -> dict[str, StoredExpert]:
        reads.append(list(ids))
        return get(self, ids)

    monkeypatch.setattr(ExpertBank, "get", noted)
    answers = store.ask_many(QUESTIONS, batch_size=8)
    [ids] = reads
    assert sorted(ids) == sorted({one.passage_id for answer in answers for one in answer.experts})


def _content(answer: Answer) -> tuple[object, ...]:
    return answer.question, answer.text, answer.experts, answer.hits, answer.is_null


def test_an_answer_is_streamed_as_it_comes(store: KnowledgeStore) -> None:
    pieces: list[str] = []
    answer = store.ask(ROME, on_text=pieces.append)
    assert "".join(pieces).rstrip("\ufffd") == answer.text.rstrip("\ufffd")
    assert answer.timings_s["first_token"] > 0


def test_mounting_by_question_and_by_ids_agree_and_leave_no_trace(store: KnowledgeStore, facts: list[Passage]) -> None:
    bare = _logits(store.models.llm)
    with store.mount([facts[0].passage_id]) as llm:
        one = _logits(llm)
    assert not torch.equal(one, bare)
    with store.mount(LYON, filters=Filters(title="Lyon")) as llm:
        by_question = _logits(llm)
    with store.mount([facts[2].passage_id]) as llm:
        assert torch.equal(_logits(llm), by_question)
    ids = [facts[0].passage_id, facts[2].passage_id]
    with store.mount(ids, weights=[1.0, 0.0]) as llm:
        assert torch.allclose(_logits(llm), one, atol=1e-4)
    with store.mount(ids) as equal, store.mount(ids, weights=[0.5, 0.5]):
        assert not torch.equal(_logits(equal), one)
    with pytest.raises(ZeroDivisionError), store.mount(ids):
        raise ZeroDivisionError
    assert torch.equal(_logits(store.models.llm), bare)
    assert not [block for block in store.models.llm.model.modules() if block._forward_hooks or block._forward_pre_hooks]


def test_mounting_refuses_unknown_ids_other_numbers_of_weights_and_no_ids(
    store: KnowledgeStore, facts: list[Passage]
) -> None:
    with pytest.raises(UnknownPassageError):
        store.mount(["f" * 32])
    for ids, weights in (([facts[0].passage_id], [0.5, 0.5]), ([], [1.0])):
        with pytest.raises(MountError):
            store.mount(ids, weights=weights)
    with store.mount([]) as llm:
        assert torch.equal(_logits(llm), _logits(store.models.llm))


def test_a_faiss_index_gives_the_hits_of_lance(store: KnowledgeStore, open_store: Open, facts: list[Passage]) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    for search in get_args(Search):
        exact, faiss = (open_store(retrieval=RetrievalConfig(search=search, index=index)) for index in get_args(Index))
        for filters in (None, Filters(source="france"), Filters(title="R*")):
            for question in QUESTIONS:
                assert faiss.retrieve(question, filters=filters) == exact.retrieve(question, filters=filters)
    assert _content(faiss.ask(ROME)) == _content(exact.ask(ROME))
    store.remove([facts[0].passage_id])
    assert faiss.retrieve(ROME) == exact.retrieve(ROME)


def test_every_way_to_search_finds_passages(store: KnowledgeStore, open_store: Open) -> None:
    for search in ("vector", "text", "hybrid"):
        hits = open_store(retrieval=RetrievalConfig(search=search)).retrieve("the fjord of Oslo")
        assert hits[0].title == "Oslo"


@pytest.mark.parametrize("codec", ["float16", "int8", "latent"])
def test_experts_of_every_codec_answer_like_exact_ones(
    codec: Codec, store: KnowledgeStore, open_store: Open, facts: list[Passage]
) -> None:
    coded = open_store(codec, bank=BankConfig(codec=codec))
    coded.add(facts[:3])
    coded.add(facts[3:])
    assert coded.ask(ROME).text != ""
    bare = _logits(store.models.llm)
    with store.mount(ROME) as llm:
        exact = _logits(llm)
    with coded.mount(ROME) as llm:
        found = _logits(llm)
    error, effect = (found - exact).norm(), (exact - bare).norm()
    assert error <= {"float16": 0.01, "int8": 0.1, "latent": 0.05}[codec] * effect
    described = coded.show(facts[0].passage_id).expert
    assert described is not None
    assert (described["codec"], described["form"] == "latent") == (codec, codec == "latent")
    assert coded.verify().problems == ()


def test_the_codec_is_kept_from_the_first_batch_on(open_store: Open, facts: list[Passage]) -> None:
    open_store(bank=BankConfig(codec="int8")).add(facts[:1])
    store = open_store(bank=BankConfig(codec="float32"))
    store.add(facts[1:2])
    described = [store.show(passage.passage_id).expert for passage in facts[:2]]
    assert [one["codec"] for one in described if one] == ["int8", "int8"]


@pytest.fixture
def untrained(tiny_models: ModelConfig, tmp_path: Path) -> ModelConfig:
    hypernetwork = load_hypernetwork(Path(tiny_models.hypernetwork))
    assert isinstance(hypernetwork, TokensHypernetwork)
    hypernetwork.config = replace(hypernetwork.config, trained_steps=0)
    hypernetwork.save(tmp_path / "untrained")
    return replace(tiny_models, hypernetwork=str(tmp_path / "untrained"))


def test_an_untrained_hypernetwork_is_refused_unless_it_is_allowed(
    untrained: ModelConfig, open_store: Open, facts: list[Passage]
) -> None:
    store = open_store(models=untrained)
    store.add(facts[:2])
    for ask in (lambda: store.ask(ROME), lambda: store.ask_many([ROME], mode="hybrid")):
        with pytest.raises(HypernetworkError, match="never trained"):
            ask()
    with pytest.raises(HypernetworkError, match="never trained"), store.mount(ROME):
        pass
    assert store.ask(ROME, mode="rag").mode == "rag"
    assert store.ask(ROME, mode="rag").experts
    assert open_store(models=untrained, allow_untrained=True).ask(ROME).experts


def test_a_store_refuses_models_that_it_was_not_made_with(
    untrained: ModelConfig, tiny_models: ModelConfig, open_store: Open, facts: list[Passage]
) -> None:
    open_store().add(facts[:2])
    other = open_store(models=untrained, allow_untrained=True)
    for use in (
        lambda: other.ask(ROME),
        lambda: other.retrieve(ROME),
        lambda: other.mount(ROME),
        lambda: other.add(facts[2:]),
    ):
        with pytest.raises(ConfigError, match="another hypernetwork"):
            use()
    assert len(other.passages()) == 2
    assert open_store(models=None).ask(ROME).experts
    swapped = open_store(models=replace(tiny_models, llm=tiny_models.retriever))
    with pytest.raises(ConfigError, match="another llm"):
        swapped.ask(ROME)


def test_a_pooled_hypernetwork_works_from_end_to_end(
    tiny_models: ModelConfig, tiny_pooled_dir: Path, open_store: Open, facts: list[Passage]
) -> None:
    pooled = replace(tiny_models, hypernetwork=str(tiny_pooled_dir))
    for codec in ("float32", "latent"):
        store = open_store(codec, models=pooled, bank=BankConfig(codec=codec))
        store.add(facts)
        alone = [store.ask(question) for question in QUESTIONS[:3]]
        assert [_content(one) for one in store.ask_many(QUESTIONS[:3])] == [_content(one) for one in alone]
        assert all(len(one.experts) == 4 for one in alone)
        with store.mount(ROME) as llm:
            assert not torch.equal(_logits(llm), _logits(open_store("none", models=pooled).models.llm))
        store.remove([facts[0].passage_id], purge=True)
        assert store.verify().problems == ()


HOSTILE = [
    "'", '"', "\\", "';DROP TABLE passages;--", '"unbalanced AND (', "title:Rome^2 ~", "a\x00b", "\x00", "???",
    "line\nbreak\r\n", "x" * 10_000, "why " * 2_500, "\U0001f600\U0001f469\u200d\U0001f680", "e\u0301\u202e\ufeff",
    "\ud800 lone",
]  # fmt: skip


@pytest.mark.parametrize("question", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_question_is_answered_like_any_other(question: str, store: KnowledgeStore) -> None:
    for mode in ("experts", "hybrid"):
        answer = store.ask(question, mode=mode)
        assert (answer.question, len(answer.experts)) == (question.replace("\ud800", "?"), 4)
    with store.mount(question):
        pass


@pytest.mark.parametrize("question", ["", " ", "\n\t\u2003"])
def test_a_blank_question_is_refused(question: str, store: KnowledgeStore) -> None:
    for ask in (
        lambda: store.ask(question),
        lambda: store.ask_many([ROME, question]),
        lambda: store.retrieve(question),
        lambda: store.mount(question),
    ):
        with pytest.raises(ConfigError, match="empty"):
            ask()


def test_settings_that_cannot_work_are_refused(store: KnowledgeStore, open_store: Open) -> None:
    with pytest.raises(ConfigError, match="mode"):
        store.ask(ROME, mode="oracle")  # type: ignore[arg-type]
    for size in (0, -1):
        with pytest.raises(ConfigError, match="batch_size"):
            store.ask_many([ROME], batch_size=size)
    with pytest.raises(KnowledgeStoreError):
        open_store(models=ModelConfig(llm="/no/such/folder")).ask(ROME)


def test_an_empty_store_says_that_it_is_empty(open_store: Open, facts: list[Passage]) -> None:
    store = open_store()
    with pytest.raises(PassageError, match="no passage yet"):
        store.ask(ROME)
    assert (store.retrieve(ROME), store.passages(), store.batches()) == ([], [], [])
    assert (store.stats().passages, store.verify().clean) == (0, True)
    with store.mount(ROME) as llm:
        assert not llm.model.training
    for use in (
        lambda: store.show("f" * 32),
        lambda: store.remove(["f" * 32]),
        lambda: store.remove(["f" * 32], purge=True),
        lambda: store.mount(["f" * 32]),
    ):
        with pytest.raises(UnknownPassageError):
            use()
    assert store.remove([], purge=True).removed == 0
    with pytest.raises(PassageError, match="no passage yet"):
        store.export(Path("never-made"))
    assert not Path("never-made").exists()
    store.add(facts[:1])
    store.rollback(1)
    answer = store.ask(ROME)
    assert (answer.is_null, answer.hits) == (True, ())


def test_passages_in_the_prompt_are_read_with_the_reader(
    open_store: Open, facts: list[Passage], tiny_models: ModelConfig, tiny_reader_dir: Path, tmp_path: Path
) -> None:
    models = replace(tiny_models, reader=str(tiny_reader_dir))
    store = open_store(models=models, bank=BankConfig(codec="float32"))
    store.add(facts)
    reader = store.models.reader
    assert reader is not None
    found = store.ask(ROME, mode="rag")
    prompt = Prompt(passages_prompt([(one.title, one.text) for one in found.experts]), question_prompt(ROME))
    tuned = reader.static_experts(store.models.llm)
    [expected] = generate(store.models.llm, [prompt], tuned, reader.config.layer, store.generation)
    [plain] = generate(store.models.llm, [prompt], None, reader.config.layer, store.generation)
    assert found.text == expected.text != plain.text
    assert store.ask(ROME, mode="hybrid").text not in ("", found.text)


def test_a_reader_for_another_model_is_an_error_unless_it_is_the_default(
    open_store: Open, tiny_models: ModelConfig, tiny_reader_dir: Path, tmp_path: Path
) -> None:
    other = ReaderHypernetwork(ReaderConfig(width=8, layer=1, n_blocks=2))
    other.save(tmp_path / "other")
    reader = open_store(models=replace(tiny_models, reader=str(tiny_reader_dir))).models.reader
    assert reader is not None
    ReaderHypernetwork(replace(reader.config, layer=reader.config.layer + 1)).save(tmp_path / "deeper")
    assert open_store(models=replace(tiny_models, reader="default")).models.reader is None
    for named in (str(tmp_path / "other"), str(tmp_path / "deeper"), tiny_models.hypernetwork):
        with pytest.raises(HypernetworkError, match="is no reader for a model of width"):
            _ = open_store(models=replace(tiny_models, reader=named)).models.reader


def test_of_twins_only_the_newest_is_mounted(open_store: Open) -> None:
    old = Passage(title="Tarvan", text="The keeper of the old lighthouse of Tarvan is Duncan Rae.")
    new = Passage(title="Tarvan", text="The keeper of the old lighthouse of Tarvan is Ann Mori.")
    other = Passage(title="Tarvan", text="Tarvan has a museum with a hoard of coins.")
    question = "Who is the keeper of the lighthouse?"
    store = open_store(bank=BankConfig(codec="float32"))
    store.add([old, other])
    assert {old.passage_id, other.passage_id} == {one.passage_id for one in store.ask(question).experts}
    batch = store.add([new])
    mounted = {one.passage_id for one in store.ask(question).experts}
    assert mounted == {new.passage_id, other.passage_id}
    assert old.passage_id in {hit.passage_id for hit in store.ask(question).hits}
    all_used = open_store(retrieval=RetrievalConfig(twin_overlap=None, null_threshold=None))
    assert old.passage_id in {one.passage_id for one in all_used.ask(question).experts}
    removal = store.remove([old.passage_id])
    assert removal.batch_id is not None
    store.rollback(removal.batch_id)  # brings the old one back, which makes it no newer
    assert {one.passage_id for one in store.ask(question).experts} == mounted
    store.rollback(batch.id)
    assert old.passage_id in {one.passage_id for one in store.ask(question).experts}


@pytest.mark.parametrize("title", ["", "Bridges"])
@pytest.mark.parametrize("question", ["When does the bridge at Kirrin close?", "when does kirrin bridge close"])
def test_texts_of_one_pattern_are_no_twins_where_the_question_names_one(
    title: str, question: str, open_store: Open
) -> None:
    text = "The swing bridge at {} closes to all traffic at {} pm every evening in winter."
    one, other = (Passage(text.format(*some), title) for some in (("Kirrin", 9), ("Tarvan", 7)))
    store = open_store(bank=BankConfig(codec="float32"))
    store.add([one])
    store.add([other])
    assert one.passage_id in {expert.passage_id for expert in store.ask(question).experts}
    newer = Passage(text.format("Kirrin", 8), title)
    store.add([newer])
    mounted = {expert.passage_id for expert in store.ask(question).experts}
    assert newer.passage_id in mounted
    assert one.passage_id not in mounted


def test_what_takes_the_place_of_a_twin_is_read_like_the_others(
    open_store: Open, tiny_models: ModelConfig, tiny_retriever_dir: Path, tmp_path: Path
) -> None:
    base = load_base(tiny_retriever_dir)
    torch.manual_seed(0)
    JointReranker(JointModel(base), JointConfig(base.digest, str(tiny_retriever_dir))).save(tmp_path / "joint")
    models = replace(tiny_models, reranker=str(tmp_path / "joint"))
    store = open_store(models=models, retrieval=RetrievalConfig(top_k=2, null_threshold=None))
    texts = ["The keeper of the old lighthouse of Tarvan is {}.", "The keeper of the lighthouse of Skerry is {}."]
    for name in ("Duncan Rae", "Ann Mori"):
        store.add([Passage(title="Tarvan", text=texts[0].format(name))])
    store.add([Passage(title="Skerry", text=texts[1].format("Tom"))])
    [one, other] = store.ask("Who is the keeper of the lighthouse?").experts
    assert one.word_weights
    assert other.word_weights


def test_only_after_a_live_batch_can_a_store_be_looked_at(store: KnowledgeStore) -> None:
    assert store.ask_many([ROME], at=1)[0].experts
    for batch_id in (0, 3):
        with pytest.raises(UnknownBatchError):
            store.ask_many([ROME], at=batch_id)
