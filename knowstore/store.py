"""KnowledgeStore: the one object to open; it joins the parts and holds no maths."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TypeVar, cast

from knowstore import _reexpert, _repair, _transfer, _upkeep, _verification
from knowstore._answering import Reader, Timer, given_weights, mounted_llm
from knowstore._bucket import Bucket, is_url
from knowstore._checks import check_mode, checked_passages, checked_questions
from knowstore._encoding import Engine, InProcess
from knowstore._ingest import Scan, Sources, write_passages
from knowstore._layout import Folder, Layout, check_catalog
from knowstore._loaded import LoadedModels, OnProgress
from knowstore._mining import passage_search as passage_search  # for `knowstore train reranker`
from knowstore._tables import State, Tables
from knowstore._transfer import PROBES_FILE as PROBES_FILE  # for `knowstore import`
from knowstore.bank import ExpertBank
from knowstore.catalog import Catalog, Change
from knowstore.config import (
    BankConfig,
    Codec,
    Filters,
    GenerationConfig,
    ModelConfig,
    RayConfig,
    RetrievalConfig,
    SplitConfig,
)
from knowstore.errors import CatalogError, ConfigError, KnowledgeStoreError, PassageError, UnknownPassageError
from knowstore.passages import FaissIndex, PassageTable, StoredRow
from knowstore.records import (
    Answer,
    BatchKind,
    EditBatch,
    Hit,
    IngestReport,
    KeptBank,
    Mode,
    MountedExpert,
    Passage,
    ReexpertReport,
    RemoveReport,
    RollbackReport,
    SourceFailure,
    Stats,
    StoredPassage,
    VerifyReport,
)
from knowstore.sources import ColumnMap

if TYPE_CHECKING:
    from knowstore.experts import Experts, FrozenLLM

_T = TypeVar("_T")


@dataclass(frozen=True)
class IngestPlan:
    """What an ingest would do."""

    new: int
    unchanged: int
    superseded: int
    sources: int
    failures: tuple[SourceFailure, ...]


@dataclass(frozen=True)
class PassageDetail:
    """A stored passage and what the bank says of its expert; None when it has none."""

    stored: StoredPassage
    expert: dict[str, object] | None


class KnowledgeStore:
    """A continual knowledge store for a frozen language model.

        with KnowledgeStore.open("kb") as store:
            batch = store.add([Passage(title="Rome", text="Rome was founded in 753 BC.")])
            print(store.ask("When was Rome founded?").text)
            store.rollback(batch.id)

    Reads see the latest committed edit batch and never wait. Writes take the store's one writer lock, first
    finish or discard what a crash left, and are either committed whole or not at all.
    """

    def __init__(
        self,
        layout: Layout,
        catalog: Catalog,
        models: LoadedModels,
        bank_config: BankConfig,
        retrieval: RetrievalConfig,
        generation: GenerationConfig,
        on_progress: OnProgress | None,
        *,
        is_following: bool,
    ) -> None:
        self.layout, self.catalog, self.models = layout, catalog, models
        self.retrieval, self.generation = retrieval, generation
        self._bank_config, self._on_progress, self._is_following = bank_config, on_progress, is_following
        self._tables = Tables(layout, catalog, bank_config.cache_bytes)
        self._faiss: FaissIndex | None = None
        self._followed: object = None

    @classmethod
    def open(
        cls,
        location: str | Path = ".knowstore",
        *,
        create: bool = True,
        catalog_url: str | None = None,
        models: ModelConfig | None = None,
        bank: BankConfig | None = None,
        retrieval: RetrievalConfig | None = None,
        generation: GenerationConfig | None = None,
        allow_untrained: bool = False,
        on_progress: OnProgress | None = None,
        cache_dir: Path | None = None,
    ) -> KnowledgeStore:
        """Open a store, bringing its catalog to the present schema and finishing what a crash left undone behind a
        commit, such as a purge; no model is loaded yet.

        Args:
            location: the store's folder, or a URL of an object store, `s3://bucket/prefix` (`gs://`, `az://`), whose
                credentials and settings come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL` ...).
            create: make the store when there is none.
            catalog_url: SQLAlchemy URL of the catalog; SQLite in the store's folder when None. A store in an object
                store has its catalog elsewhere.
            models: which models; when None, those that the store was made with.
            bank: how experts are kept; the codec counts when the store is made and is kept from then on.
            retrieval, generation: how questions are answered.
            allow_untrained: answer with a hypernetwork that nobody trained.
            on_progress: called with a stage, steps done and steps in all (None when unknown).
            cache_dir: where converted models are kept; the user's cache directory when None.

        Raises:
            ConfigError: no store there and `create` is False, or a setting that cannot work.
            CatalogError: the catalog cannot be read, or was written by a newer version.
        """
        layout = _layout_of(location, create=create, catalog_url=catalog_url)
        catalog = Catalog.open(catalog_url or cast(Path, layout.own_catalog))
        try:
            check_catalog(layout, catalog)
            loaded = LoadedModels(models or catalog.models(), allow_untrained, on_progress, cache_dir)
            bank = bank or BankConfig()
            codec = catalog.setting("codec")
            if codec is not None:
                bank = replace(bank, codec=cast(Codec, codec))
            store = cls(
                layout,
                catalog,
                loaded,
                bank,
                retrieval or RetrievalConfig(),
                generation or GenerationConfig(),
                on_progress,
                is_following=models is None,
            )
            store._finish()
            return store
        except BaseException:
            catalog.close()
            raise

    @staticmethod
    def is_at(location: str | Path) -> bool:
        """Whether there is a store; nothing of it is opened.

        Raises:
            ConfigError: an object store that cannot be reached.
        """
        return Bucket.is_at(location) if is_url(location) else Folder.is_at(Path(location))

    def close(self) -> None:
        """Close the catalog; the tables need no closing."""
        self.catalog.close()

    def __enter__(self) -> KnowledgeStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # adding

    def plan(
        self,
        paths: Sequence[str],
        *,
        split: SplitConfig | None = None,
        columns: ColumnMap | None = None,
        stdin: BinaryIO | None = None,
    ) -> IngestPlan:
        """What `ingest` would do with the same arguments; loads no model and writes nothing."""
        with ExitStack() as stack:
            sources = Sources(paths, split or SplitConfig(), columns, stdin, stack, self._own_folder)
            scan = sources.scan(self._on_progress, strict=False)
        ids = scan.passage_ids
        live = self.catalog.live_ids(ids)
        change = self._change(scan)
        _, ending = self.catalog.effects(change)
        return IngestPlan(len(ids - live), len(live), len(ending), len(sources.sources), tuple(scan.failures))

    def ingest(
        self,
        paths: Sequence[str],
        *,
        split: SplitConfig | None = None,
        columns: ColumnMap | None = None,
        strict: bool = False,
        note: str = "",
        stdin: BinaryIO | None = None,
        ray: RayConfig | None = None,
    ) -> IngestReport:
        """Turn files into passages with experts, as one edit batch.

        What is stored already stays as it is; passages that a source held before and holds no more are
        superseded. Interrupted, it can be run again and goes on where it was.

        Args:
            paths: files, folders, glob patterns, or `-` for `stdin`.
            split: how documents become passages.
            columns: which columns of tabular data are what; found by their names when None.
            strict: stop at the first input that cannot be read, before anything is written.
            stdin: binary stream that `-` stands for.
            ray: run the models on workers of a Ray cluster; in this process when None. What is written is the same.

        Raises:
            SourceError: when `strict`.
            StoreLockedError: another writer holds the store.
            EngineError: there is no such cluster, or its workers keep dying; what they finished is taken up by the
                next ingest.
        """
        started = time.perf_counter()
        with ExitStack() as stack:
            sources = Sources(paths, split or SplitConfig(), columns, stdin, stack, self._own_folder)
            head = self.catalog.head()
            scan = sources.scan(self._on_progress, strict=strict)
            stack.enter_context(self._writer(keep_staged=True))
            if self._are_changed_since(head, scan.placements):  # maybe by newer versions of the files
                scan = sources.scan(self._on_progress, strict=strict)
            n_unchanged = len(self.catalog.live_ids(scan.passage_ids))
            change = self._change(scan)
            engine = _engine(ray, self.models)
            batch, model_seconds = self._commit(
                "ingest", change, lambda wanted: sources.again(wanted), note, engine=engine
            )
        return IngestReport(
            batch_id=None if batch is None else batch.id,
            passages_added=0 if batch is None else batch.n_added,
            passages_unchanged=n_unchanged,
            passages_superseded=0 if batch is None else batch.n_superseded,
            failures=tuple(scan.failures),
            seconds=time.perf_counter() - started,
            seconds_in_models=model_seconds,
        )

    @property
    def _own_folder(self) -> Path | None:
        return self.layout.folder if isinstance(self.layout, Folder) else None

    def _are_changed_since(self, batch_id: int, sources: Container[str]) -> bool:
        """Whether an edit batch after this one is about one of the sources."""
        if self.catalog.head() == batch_id:
            return False
        later = [batch.id for batch in self.catalog.batches() if batch.id > batch_id]
        pairs = (pair for one in later for pairs in self.catalog.batch_items(one).values() for pair in pairs)
        return any(source in sources for _, source in pairs)

    def _change(self, scan: Scan) -> Change:
        added, superseded = [], []
        for source, ids in scan.placements.items():
            live = {passage_id for passage_id, _ in self.catalog.live_placements(source=source)}
            added += [(passage_id, source) for passage_id in sorted(ids - live)]
            if source not in scan.unread:
                superseded += [(passage_id, source) for passage_id in sorted(live - ids)]
        return Change(added=added, removed=[], superseded=superseded)

    def add(self, passages: Sequence[Passage], *, note: str = "") -> EditBatch:
        """Add passages as one edit batch; those that are live already change nothing.

        Raises:
            PassageError: a passage without text, or nothing that is new.
            StoreLockedError: another writer holds the store.
        """
        return self._replace([], passages, "add", note)

    def replace(self, passage_id: str, passage: Passage, *, note: str = "") -> EditBatch:
        """Put a passage in the place of another, as one edit batch.

        Raises:
            UnknownPassageError: no live passage has this id.
            PassageError: title and text are those of a live passage; a date is kept with its text and does not change
                alone.
        """
        return self._replace([passage_id], [self.check_replacement(passage_id, passage)], "replace", note)

    def check_replacement(self, passage_id: str, passage: Passage) -> Passage:
        """The passage as `replace` would put it in the place of another, with nothing changed yet.

        Raises:
            PassageError: as for `replace`.
        """
        [passage] = checked_passages([passage])
        if passage.passage_id == passage_id and passage.date != self.show(passage_id).stored.passage.date:
            raise PassageError(
                f"passage {passage_id} has this title and text already, and its date cannot change alone",
                kept="the store is as it was", fix="remove it with purge and add it with its new date",
            )  # fmt: skip
        return passage

    def _replace(self, old_ids: Sequence[str], passages: Sequence[Passage], kind: BatchKind, note: str) -> EditBatch:
        passages = checked_passages(passages)
        by_id = {passage.passage_id: passage for passage in passages}
        pairs = list(dict.fromkeys((passage.passage_id, passage.source) for passage in passages))
        with self._writer():
            live = set(self.catalog.live_placements(passage_ids=by_id))
            removed = [pair for pair in self._live_pairs(old_ids) if pair not in set(pairs)]
            change = Change([pair for pair in pairs if pair not in live], removed, [])
            batch, _ = self._commit(kind, change, lambda wanted: (by_id[i] for i in sorted(wanted)), note)
        if batch is None:
            raise PassageError(
                "every one of these passages is live already",
                kept="the store is as it was",
                fix="nothing needs to be done",
            )
        return batch

    # taking away

    def remove(self, passage_ids: Sequence[str], *, purge: bool = False, note: str = "") -> RemoveReport:
        """Remove passages as one edit batch; a removed passage is never found again, until a rollback.

        Args:
            passage_ids: live passages; with `purge` also ones that were removed before.
            purge: delete text, vectors and tensors from every file of the store; no rollback brings them back.

        Raises:
            UnknownPassageError: an id that is not live (with `purge`: was never stored); nothing was removed.
        """
        ids = list(dict.fromkeys(passage_ids))
        with self._writer():
            live = self.catalog.live_ids(ids)
            known = self.catalog.purged(ids) | {passage_id for passage_id, _, _ in self.catalog.intervals(ids)}
            is_purge = purge and self._tables.are_there
            purgeable = self._tables.passages().existing(ids) | known if is_purge else set()
            self._check_known(ids, live | purgeable)
            change, settings = Change([], self._live_pairs(sorted(live)), []), _upkeep.purging(ids if purge else [])
            batch, _ = self._commit("remove", change, None, note, settings)
            if is_purge:
                self.catalog.set_settings(settings)
                _upkeep.finish_purge(self.catalog, self._tables.passages(), self._tables.banks())
                self.forget()
        return RemoveReport(None if batch is None else batch.id, len(live), purge)

    def rollback(self, batch_id: int, *, note: str = "") -> RollbackReport:
        """Restore exactly what was live just before an edit batch, undoing it and every later one.

        The rollback is an edit batch itself and can be rolled back.

        Raises:
            UnknownBatchError: no live batch has this id.
            CatalogError: passages that would come back were purged; nothing was changed.
        """
        with self._writer():
            change = self._rollback_change(batch_id)
            batch, _ = self._commit("rollback", change, None, note or f"undo batch {batch_id} and later")
        if batch is None:
            return RollbackReport(None, 0, 0)
        return RollbackReport(batch.id, batch.n_added, batch.n_removed)

    def rollback_preview(self, batch_id: int) -> RollbackReport:
        """What `rollback` would restore and remove; changes nothing."""
        coming, going = self.catalog.effects(self._rollback_change(batch_id))
        return RollbackReport(None, len(coming), len(going))

    def _rollback_change(self, batch_id: int) -> Change:
        change = self.catalog.rollback_change(batch_id)
        purged = self.catalog.purged({passage_id for passage_id, _ in change.added})
        if purged:
            raise CatalogError(
                f"{len(purged)} passages that were live before batch {batch_id} were purged since",
                kept="the store is as it was",
                fix="ingest their source again, or roll back to a later batch",
            )
        return change

    # asking

    def retrieve(self, question: str, *, filters: Filters | None = None) -> list[Hit]:
        """The passages proposed for a question (Eq. 7) in the reranker's order, best first.

        Raises:
            ConfigError: an empty question, or models that are not those of the store.
        """
        (question,) = checked_questions([question])
        return self._read(lambda reader: reader.retrieve(question, filters, Timer())) or []

    def ask(
        self,
        question: str,
        *,
        mode: Mode = "experts",
        filters: Filters | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answer a question from the store.

        Args:
            mode: `experts` mounts the experts of the retrieved passages and asks the question alone, `rag` puts
                the passages in the prompt, `hybrid` does both.
            filters: which passages may be used.
            on_text: called with pieces of the answer as they come.

        Raises:
            HypernetworkError: the hypernetwork was never trained.
            ConfigError: an unknown mode, or models that are not those of the store.
        """
        return self._answer([question], mode, filters, on_text)[0]

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        mode: Mode = "experts",
        filters: Filters | None = None,
        batch_size: int = 16,
        at: int | None = None,
        has_details: bool = True,
        ray: RayConfig | None = None,
    ) -> list[Answer]:
        """Answer questions in batches, each with its own experts, in the order given; arguments as for `ask`.

        Prompts of similar length are answered together. The seconds of generating are those of a whole batch. `at` is
        the live edit batch after which the store is looked at, the latest when None; a passage that was removed and
        brought back since is missed. `ray` lets workers of a Ray cluster answer; the answers are the same.

        Without `has_details` answers have no `hits`, and their experts neither text nor weights of sentences and words,
        which take nearly all of an answer's memory: for very many questions do without, or use `ask_each`.

        Raises:
            UnknownBatchError: no live batch `at`.
            ConfigError: as for `ask`; or `ray` where answers are drawn.
            EngineError: there is no such cluster, or its workers keep dying.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", kept="nothing was asked", fix="use at least 1")
        if not questions:
            return []
        return self._answer(
            questions, mode, filters, None, at=at, batch_size=batch_size, has_details=has_details, ray=ray
        )

    def ask_each(
        self, questions: Iterable[str], *, mode: Mode = "experts", filters: Filters | None = None, batch_size: int = 16
    ) -> Iterator[Answer]:
        """As `ask_many`, but each answer is given as soon as its batch is done and none is kept: for any number."""
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", kept="nothing was asked", fix="use at least 1")
        remaining = iter(questions)
        while batch := list(islice(remaining, batch_size)):
            yield from self._answer(batch, mode, filters, None, batch_size=batch_size)

    def _answer(
        self,
        questions: Sequence[str],
        mode: Mode,
        filters: Filters | None,
        on_text: Callable[[str], None] | None,
        *,
        at: int | None = None,
        batch_size: int = 1,
        has_details: bool = True,
        ray: RayConfig | None = None,
    ) -> list[Answer]:
        check_mode(mode)
        questions = checked_questions(questions)
        if at is not None:
            self.catalog.check_live(at)

        def answer(reader: Reader) -> list[Answer]:
            if mode != "rag":
                self.models.check_trained()
            if ray is None:
                return reader.answer(questions, mode, filters, on_text, batch_size=batch_size, has_details=has_details)
            from knowstore import _ray_answers

            return _ray_answers.answers(reader, ray, questions, mode, filters, batch_size, has_details=has_details)

        answers = self._read(answer, at)
        if answers is None:
            raise self._nothing_yet("asked")
        return answers

    def mount(
        self,
        question_or_ids: str | Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        filters: Filters | None = None,
    ) -> AbstractContextManager[FrozenLLM]:
        """The LLM with chosen experts on, for the time of a `with` block.

            with store.mount("Who founded Rome?") as llm:
                llm.model.generate(...)

        Args:
            question_or_ids: a question, whose experts are retrieved and weighed, or passage ids.
            weights: one for each id; equal ones when None.

        Raises:
            UnknownPassageError: an id that is not live.
            MountError: another number of weights than ids.
            ConfigError: an empty question, or models that are not those of the store.
        """
        if isinstance(question_or_ids, str):
            (question_or_ids,) = checked_questions([question_or_ids])

        def chosen(reader: Reader) -> Experts | None:
            if isinstance(question_or_ids, str):
                hits = reader.retrieve(question_or_ids, filters, Timer(), n_best=reader.retrieval.top_k)
                return reader.experts([reader.weigh(hits)], "experts")
            ids = list(question_or_ids)
            rows = {row.id: row for row in reader.table.get(ids, at=reader.at)}
            self._check_known(ids, set(rows))
            mounted = [
                MountedExpert(
                    i, w, 0.0, rows[i].live_from, rows[i].passage.source, rows[i].passage.title, rows[i].passage.text
                )
                for i, w in zip(ids, given_weights(weights, len(ids)), strict=True)
            ]
            return reader.experts([mounted], "experts")

        if not isinstance(question_or_ids, str) and not self._tables.are_there:
            self._check_known(question_or_ids, set())
        return mounted_llm(self.models, self._read(chosen))

    # looking

    def batches(self, limit: int | None = None, offset: int = 0) -> list[EditBatch]:
        """Edit batches, newest first."""
        return self.catalog.batches(limit, offset)

    def batch_items(self, batch_id: int) -> dict[str, list[tuple[str, str]]]:
        """The pairs (passage_id, source) that a batch `added`, `removed` and `superseded`."""
        return self.catalog.batch_items(batch_id)

    def passages(self, *, source: str | None = None, limit: int | None = None, offset: int = 0) -> list[StoredPassage]:
        """Live passages in the order they were added, of one source if given."""

        def read(state: State, pairs: list[tuple[str, str]]) -> list[StoredRow]:
            ids = list(dict.fromkeys(passage_id for passage_id, _ in pairs))
            chosen = ids[offset:] if limit is None else ids[offset : offset + limit]
            return state.tables[0].get(chosen, at=state.head) if chosen and state.tables is not None else []

        rows = self._tables.in_one_state(read, lambda: self.catalog.live_placements(source=source))
        return [StoredPassage(row.passage, row.id, row.live_from) for row in rows]

    def show(self, passage_id: str) -> PassageDetail:
        """One stored passage, live or removed, and its expert.

        Raises:
            UnknownPassageError: no passage with this id is stored.
        """

        def read(state: State, _: None) -> PassageDetail:
            rows = [] if state.tables is None else state.tables[0].get([passage_id], at=None)
            rows = [row for row in rows if row.live_from <= state.head]
            self._check_known([passage_id], {row.id for row in rows})
            row, (_table, bank) = rows[0], cast(tuple[PassageTable, ExpertBank], state.tables)
            is_live = row.live_from <= state.head < row.live_to
            stored = StoredPassage(row.passage, row.id, row.live_from, "live" if is_live else "removed")
            expert = next(iter(bank.iter_encoded([passage_id])), None)
            return PassageDetail(stored, None if expert is None else expert.description())

        return self._tables.in_one_state(read, lambda: None)

    def stats(self) -> Stats:
        """Live passages, experts in the bank, live edit batches, and bytes on disk of each part."""
        sizes = self.layout.size_bytes()
        n_batches = sum(batch.state == "live" for batch in self.catalog.batches())
        n_experts = self._tables.bank().count() if self._tables.are_there else 0
        return Stats(self.catalog.count_live(), n_experts, n_batches, sizes)

    def forget(self) -> None:
        """Drop the decoded experts that are kept in memory; the next question reads them from disk."""
        self._tables.forget()

    @property
    def codec(self) -> Codec | None:
        """How the store keeps its experts; None until it holds the first."""
        return cast(Codec | None, self.catalog.setting("codec"))

    def weights_note(self) -> str:
        """How good the configured hypernetwork is, in its makers' words."""
        return str(self.models.hypernetwork_config.get("notes", ""))

    # upkeep

    def verify(self, *, repair: bool = False) -> VerifyReport:
        """Compare catalog, passages and experts row by row, every expert's bytes with their checksum, and its form and
        width with the models where they are on this machine.

        Args:
            repair: mend what can be mended: visibility from the catalog, experts from their passages.
        """
        if not self._tables.are_there:
            return VerifyReport(True, (), {})
        if not repair:
            with suppress(CatalogError):  # of a setting that is damaged: the report names it
                self._follow(self.catalog.setting("fingerprints"))
            return _verification.verify(self.catalog, self._tables, self.models, self._on_progress)
        with self.layout.lock(), self.catalog.writer():
            self.layout.sweep()
            self.catalog.mend()
            with suppress(CatalogError):
                self._follow(self.catalog.setting("fingerprints"))
            codec = self._bank_config.codec
            return _repair.repair(self.catalog, self._tables, self.models, codec, self._on_progress)

    def reexpert(self, *, is_undone: bool = False, ray: RayConfig | None = None) -> ReexpertReport:
        """Change the store over to the models that it was opened with: their experts are generated beside those in
        use, while readers go on, and one commit makes all of them the store's. Interrupted, it goes on where it was.
        The experts of before are kept until `drop_previous`.

        Args:
            is_undone: change back to the models that the store had before; only experts of passages that are newer
                than the change are generated. Done already, it is refused and not turned round again.
            ray: as for `ingest`.

        Raises:
            ConfigError: another retriever, or nothing to undo.
            HypernetworkError: the hypernetwork was never trained.
            EngineError: as for `ingest`; what workers finished is taken up by the next `reexpert`.
        """
        with self._writer():
            models = _reexpert.previous_models(self.catalog, self.models) if is_undone else self.models
            codec, table = self._bank_config.codec, self._tables.passages()
            engine = _engine(ray, models)
            report = _reexpert.reexpert(
                self.layout, self.catalog, table, models, engine, codec, self._on_progress, is_undone=is_undone
            )
        self.models = models
        return report

    def kept_banks(self) -> list[KeptBank]:
        """The banks that `drop_previous` would delete."""
        return _reexpert.others(self.layout, self.catalog)

    def drop_previous(self) -> int:
        """Delete the experts that `reexpert` kept of other models; returns of how many."""
        with self._writer():
            return _reexpert.drop_others(self.layout, self.catalog)

    def export(self, folder: Path, *, probes: Callable[[], str] | None = None) -> int:
        """Write live passages, vectors and experts to a folder that `import_` reads; returns how many. When it fails,
        the folder is left empty; what an export left that was killed is deleted by the next one into its folder.

        Args:
            folder: one that is new or empty.
            probes: gives the rows of the probes that go with what is live, of the same state as all that is exported;
                it is asked again when the store changes meanwhile.

        Raises:
            ConfigError: the folder is not empty.
            PassageError: the store is damaged, or was never given a passage.
        """

        def write(state: State, found: tuple[list[tuple[str, str]], str | None]) -> int:
            if state.head == 0 or state.tables is None:
                raise self._nothing_yet("exported")
            table, bank = state.tables
            recorded = cast(dict[str, str], state.recorded)
            fingerprints = {role: digest for role, digest in recorded.items() if role != "bank"}
            pairs, rows = found
            return _transfer.export(folder, state.head, pairs, table, bank, fingerprints, rows)

        return self._tables.in_one_state(
            write, lambda: (self.catalog.live_placements(), None if probes is None else probes())
        )

    def import_(self, folder: Path, *, note: str = "") -> IngestReport:
        """Add the passages and experts of an exported bank as one edit batch; nothing is generated anew.

        Raises:
            SourceError: the folder is no exported bank, is damaged, or holds rows that this store cannot use; nothing
                was changed.
            FingerprintError: its experts were made for other models.
        """
        started = time.perf_counter()
        bundle = _transfer.Bundle.open(folder)
        with self._writer():
            bundle.check(self.models.fingerprints)
            pairs = bundle.pairs()
            live = set(self.catalog.live_placements())
            n_unchanged = len(self.catalog.live_ids({passage_id for passage_id, _ in pairs}))
            change = Change([pair for pair in pairs if pair not in live], [], [])

            def write(wanted: set[str], batch_id: int) -> float:
                table, bank = self._writable()
                bundle.write(wanted, pairs, table, bank, batch_id, self.models)
                return 0.0

            batch, _ = self._apply("import", change, write, note)
        n_added = 0 if batch is None else batch.n_added
        seconds = time.perf_counter() - started
        return IngestReport(None if batch is None else batch.id, n_added, n_unchanged, 0, (), seconds)

    # the commit protocol

    def _commit(
        self,
        kind: BatchKind,
        change: Change,
        passages: Callable[[set[str]], Iterator[Passage]] | None,
        note: str,
        settings: Mapping[str, object] | None = None,
        engine: Engine | None = None,
    ) -> tuple[EditBatch | None, float]:
        def write(wanted: set[str], batch_id: int) -> float:
            if not wanted:
                return 0.0
            if passages is None:
                raise PassageError(
                    f"{len(wanted)} passages that would come back are lost, or their experts are",
                    kept="the store is as it was",
                    fix="run `knowstore verify --repair` and try again; ingest sources again whose text is lost",
                )
            table, bank = self._writable()
            codec, used = self._bank_config.codec, engine or InProcess(self.models)
            written = write_passages(
                passages(wanted), len(wanted), table, bank, used, codec, batch_id, self._on_progress
            )
            if missing := wanted - written:
                raise PassageError(
                    f"{len(missing)} passages were read at first and not again: a source changed meanwhile",
                    kept="the store is as it was; what was generated is taken up by the next ingest",
                    fix="run the command again",
                )
            return used.model_seconds

        return self._apply(kind, change, write, note, settings)

    def _apply(
        self,
        kind: BatchKind,
        change: Change,
        write: Callable[[set[str], int], float],
        note: str,
        settings: Mapping[str, object] | None = None,
    ) -> tuple[EditBatch | None, float]:
        """Stage, write rows, commit: nobody sees anything of the batch before the last step, which sets `settings`."""
        coming, going = self.catalog.effects(change)
        if not (coming or going or change.added or change.removed or change.superseded):
            _upkeep.recover(self.catalog, *self._tables.both())
            return None, 0.0
        table, bank = self._writable() if coming or self._tables.are_there else (None, None)
        interrupted = self.catalog.staged()
        if table is not None:
            self._check_catalog_is_newest(table, self.catalog.head() if interrupted is None else interrupted.id)
        if interrupted is not None and table is not None and bank is not None:
            _upkeep.resume(self.catalog, table, bank, interrupted.id, coming)
        staged = interrupted or self.catalog.stage(
            kind,
            note,
            passages_version=None if table is None else table.version,
            experts_version=None if bank is None else bank.version,
        )
        known: set[str] = set()
        model_seconds = 0.0
        try:
            if table is not None and bank is not None:
                known = table.existing(coming) & bank.existing(coming)
                model_seconds = write(coming - known, staged.id)
                table.revive(known, staged.id)
                table.retire(going, staged.id)
                table.optimize()
                bank.optimize()
            batch = self.catalog.commit(
                staged.id,
                change,
                passages_version=None if table is None else table.version,
                experts_version=None if bank is None else bank.version,
                settings=settings,
                note=note,
            )
        except Exception:
            if kind != "ingest":
                _upkeep.recover(self.catalog, table, bank)
            raise
        if table is not None:
            given_up = {passage_id for passage_id, _ in (*change.removed, *change.superseded)}
            _upkeep.settle_sources(self.catalog, table, batch.id, known | given_up)
        return batch, model_seconds

    def _check_catalog_is_newest(self, table: PassageTable, latest: int) -> None:
        """Refuse to stage a batch under an id that rows of a lost one carry: its commit would show them."""
        if n := table.count_after(latest):
            raise CatalogError(
                f"the catalog ends with edit batch {latest}, and {n:,} passages are marked by later ones: it is older "
                f"than the tables in {self.layout.location}",
                kept="both are as they were",
                fix="restore a later backup of the catalog, or let `knowstore verify --repair` make the tables like it",
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep all other writers away, and take up what they did."""
        with self.layout.lock(), self.catalog.writer():
            self.layout.sweep()
            self._follow(self.catalog.setting("fingerprints"))
            yield

    @contextmanager
    def _writer(self, *, keep_staged: bool = False) -> Iterator[None]:
        """Be the one writer; what a dead one left is discarded first, or kept for an ingest to go on with."""
        with self._locked():
            if self._tables.are_there:
                _upkeep.finish(self.catalog, self._tables.passages(), self._tables.banks())
            staged = self.catalog.staged()
            if staged is not None and not (keep_staged and staged.kind == "ingest"):
                _upkeep.recover(self.catalog, *self._tables.both())
            yield

    def _finish(self) -> None:
        """Do what a crash left undone behind a commit, if it can be done now: nobody who reads sees a difference, and
        the next writer has to do it."""
        if self._tables.are_there and _upkeep.is_unfinished(self.catalog):
            with suppress(KnowledgeStoreError), self._writer(keep_staged=True):
                pass

    # the tables

    def _read(self, use: Callable[[Reader], _T], at: int | None = None) -> _T | None:
        """What `use` makes of one state of the store, seen after batch `at` if given; None while the store is empty."""

        def read(state: State, _: None) -> _T | None:
            reader = self._reader_of(state if at is None else replace(state, head=at))
            if reader is None:
                return None
            result = use(reader)
            self._faiss = reader.faiss
            return result

        return self._tables.in_one_state(read, lambda: None)

    def _reader(self) -> Reader | None:
        """The latest state's; None while the store is empty."""
        state, _ = self._tables.state(lambda: None)
        return self._reader_of(state)

    def _reader_of(self, state: State) -> Reader | None:
        if state.head == 0 or state.tables is None:
            return None
        self._follow(state.recorded)
        self.models.check_store(state.recorded)
        return Reader(
            *state.tables, self.models, self.retrieval, self.generation, state.head, self._faiss,
            introduced=partial(self.catalog.introduced, at=state.head),
            shared=partial(self.catalog.shared, at=state.head),
        )  # fmt: skip

    def _writable(self) -> tuple[PassageTable, ExpertBank]:
        """Both tables for writing, made with the store's first batch, with the models' fingerprints recorded."""
        self.models.check_store(self.catalog.setting("fingerprints"))
        if self.catalog.setting("fingerprints") is None:
            fingerprints, kept = self.models.fingerprints, self.models.kept_config()
            for role, digest in fingerprints.items():
                self.catalog.fingerprint(role, digest, {"reference": str(getattr(kept, role, role))})
            self.catalog.set_setting("models", asdict(kept))
            self.catalog.set_setting("codec", self._bank_config.codec)
            self.catalog.set_setting("fingerprints", fingerprints)  # last: it says that all of them are there
        if self.catalog.head() == 0 and self.catalog.staged() is None:
            self._tables.make(self.models.retriever.dim)
        return self._tables.passages(), self._tables.bank()

    def _follow(self, recorded: object) -> None:
        """Where the store was opened without naming models, go over to those of a `reexpert` elsewhere."""
        if self._is_following and recorded != self._followed:
            self._followed, models = recorded, self.catalog.models()
            if models != self.models.config:
                self.models = self.models.with_config(models)

    def _nothing_yet(self, done: str) -> PassageError:
        return PassageError(
            f"the store in {self.layout.location} holds no passage yet",
            kept=f"nothing was {done}",
            fix="ingest something first: `knowstore ingest PATH`",
        )

    def _live_pairs(self, passage_ids: Sequence[str]) -> list[tuple[str, str]]:
        if not passage_ids:
            return []
        self._check_known(passage_ids, self.catalog.live_ids(passage_ids))
        return self.catalog.live_placements(passage_ids=passage_ids)

    def _check_known(self, passage_ids: Sequence[str], known: set[str]) -> None:
        unknown = [passage_id for passage_id in passage_ids if passage_id not in known]
        if unknown:
            raise UnknownPassageError(
                f"no passage {unknown[0]!r} in the store" + (f" (and {len(unknown) - 1} more)" if unknown[1:] else ""),
                kept="the store is as it was",
                fix="`knowstore list` shows the passages there are",
            )


def _engine(ray: RayConfig | None, models: LoadedModels) -> Engine:
    if ray is None:
        return InProcess(models)
    from knowstore._ray_experts import RayEngine

    return RayEngine(ray, models)


def _layout_of(location: str | Path, *, create: bool, catalog_url: str | None) -> Layout:
    if is_url(location):
        return Bucket.open(location, create=create, catalog_url=catalog_url)
    return Folder.open(Path(location), create=create, catalog_url=catalog_url)
