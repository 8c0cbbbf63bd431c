"""Many questions answered on the workers of a Ray cluster.

In two rounds, for the questions of one generation are those whose prompts are of similar length: workers first choose
passages for every question, then write the answers to the very batches that one process makes. They read the tables in
the versions that this process sees. The catalog is read here alone: a question whose candidates have twins comes back
once, and is chosen for again with what the catalog says of those.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from knowstore._answering import ASKED_AT_ONCE, Chosen, Reader, brief, prompt_batches
from knowstore._ray import Job, Worker, Workers, cluster
from knowstore.bank import ExpertBank
from knowstore.config import Filters, GenerationConfig, RayConfig, RetrievalConfig
from knowstore.errors import ConfigError
from knowstore.passages import PassageTable
from knowstore.records import Answer, Mode

_SHARE = 8  # questions that passages are chosen for at once, a second or two of work
_KEPT = "the store, which a question never changes"
_ROLES: dict[Mode, tuple[str, ...]] = {
    "experts": ("llm", "retriever", "reranker", "hypernetwork"),
    "rag": ("llm", "retriever", "reranker", "reader"),
    "hybrid": ("llm", "retriever", "reranker", "hypernetwork", "reader"),
}

Asked = tuple[int, str]  # a question with its place among all
Introduced = Mapping[str, int | None]  # passages with the edit batch that brought each, if the catalog knows it


@dataclass(frozen=True)
class _View:
    """What is asked: both tables in one version each, as edit batch `at` left them, and how."""

    uri: str
    passages: int
    bank: str
    experts: int
    fingerprint: str | None
    cache_bytes: int
    at: int
    retrieval: RetrievalConfig
    generation: GenerationConfig
    mode: Mode
    filters: Filters | None


@dataclass(frozen=True)
class _Choices:
    """What was chosen for some questions, and passages of which others need to know when they came."""

    chosen: dict[int, Chosen]
    wanted: dict[int, set[str]]


class _UnknownError(Exception):
    """Passages of which this worker was not told when they came."""

    def __init__(self, ids: Collection[str]) -> None:
        super().__init__(ids)
        self.ids = set(ids)


class _Worker(Worker):
    def __init__(self, job: Job, view: _View) -> None:
        super().__init__(job)
        self._view = view
        self._known: Introduced = {}

    @cached_property
    def _reader(self) -> Reader:
        view = self._view
        table = PassageTable.open(view.uri).at_version(view.passages)
        bank = ExpertBank.open(
            view.uri, fingerprint=view.fingerprint, name=view.bank, cache_bytes=view.cache_bytes
        ).at_version(view.experts)
        return Reader(table, bank, self.models, view.retrieval, view.generation, view.at, introduced=self._introduced)

    def choose(self, asked: Sequence[Asked], known: Introduced) -> _Choices:
        """Passages for some questions."""
        self._known = known
        found = _Choices({}, {})
        for index, question in asked:
            try:
                found.chosen[index] = self._reader.choose(question, self._view.mode, self._view.filters)
            except _UnknownError as unknown:
                found.wanted[index] = unknown.ids
        return found

    def write(self, indices: Sequence[int], chosen: Sequence[Chosen]) -> dict[int, Answer]:
        """Answer the questions of one generation."""
        return dict(zip(indices, self._reader.write(chosen, self._view.mode, None), strict=True))

    def _introduced(self, ids: Collection[str]) -> dict[str, int]:
        if unknown := set(ids) - set(self._known):
            raise _UnknownError(unknown)
        return {passage_id: batch for passage_id in ids if (batch := self._known[passage_id]) is not None}


def answers(
    reader: Reader,
    config: RayConfig,
    questions: Sequence[str],
    mode: Mode,
    filters: Filters | None,
    batch_size: int,
    *,
    has_details: bool = True,
) -> list[Answer]:
    """What `reader.answer` gives, by workers; no model is loaded here.

    Args:
        reader: of a store, with its tables fixed.
        config: the workers.
        questions, mode, filters, batch_size, has_details: as for `Reader.answer`.

    Raises:
        ConfigError: answers that are drawn, Ray is not installed, or a worker has other models than this process.
        EngineError: no cluster, or questions whose workers died again and again.
    """
    if reader.generation.do_sample:
        raise ConfigError(
            "answers are to be drawn, and workers of their own would draw the same numbers for different questions",
            kept=_KEPT,
            fix="leave out --sample (do_sample), or --engine ray",
        )
    n_shares = -(-len(questions) // _SHARE)
    found: list[Answer] = []
    with cluster(config, Job.of(reader.models, _ROLES[mode], _KEPT)) as nodes:
        workers = nodes.start(min(nodes.n_workers, n_shares), _Worker, _view(reader, mode, reader.placed(filters)))
        for first in range(0, len(questions), ASKED_AT_ONCE):
            asked = list(enumerate(questions[first : first + ASKED_AT_ONCE]))
            chosen = _chosen(workers, reader, [asked[place : place + _SHARE] for place in range(0, len(asked), _SHARE)])
            batches = prompt_batches([one.prompt for one in chosen], batch_size)
            tasks = ((batch, [replace(chosen[index], hits=[]) for index in batch]) for batch in batches)
            written: dict[int, Answer] = {}
            for made in workers.done("write", tasks):
                written.update(made if has_details else {index: brief(one) for index, one in made.items()})
            hits = [tuple(one.hits) if has_details else () for one in chosen]
            found += [replace(written[index], hits=some) for index, some in enumerate(hits)]
    return found


def _chosen(workers: Workers, reader: Reader, shares: Sequence[Sequence[Asked]]) -> list[Chosen]:
    """What was chosen for every question, in their order."""
    chosen: dict[int, Chosen] = {}
    known: dict[int, dict[str, int | None]] = {}
    while shares:
        wanted: dict[int, set[str]] = {}
        told = ({i: batch for index, _ in share for i, batch in known.get(index, {}).items()} for share in shares)
        for made in workers.done("choose", zip(shares, told, strict=True)):
            chosen.update(made.chosen)
            wanted.update(made.wanted)
        ids = set().union(*wanted.values())
        batches = reader.introduced(ids) if ids and reader.introduced is not None else {}
        for index, some in wanted.items():
            known.setdefault(index, {}).update((passage_id, batches.get(passage_id)) for passage_id in some)
        shares = [left for share in shares if (left := [one for one in share if one[0] in wanted])]
    return [chosen[index] for index in sorted(chosen)]


def _view(reader: Reader, mode: Mode, filters: Filters | None) -> _View:
    table, bank = reader.table, reader.bank
    assert isinstance(bank, ExpertBank)  # for it is a store's
    return _View(
        bank.uri, table.version, bank.name, bank.version, bank.fingerprint, bank.cache_info().max_bytes, reader.at,
        reader.retrieval, reader.generation, mode, filters,
    )  # fmt: skip
