"""A long life of a store: many edit batches with updates, removals and contradictions among them, and audits."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

from knowstore._loaded import OnProgress
from knowstore.audits import Selection, add_probes, run_audit, summarise, write_report
from knowstore.bench.corpus import read_questions
from knowstore.bench.resuming import keep_run
from knowstore.config import ModelConfig, SplitConfig
from knowstore.errors import ConfigError
from knowstore.evaluation import holds_answer, normalise
from knowstore.records import Audit, Mode, Passage, Probe
from knowstore.store import KnowledgeStore
from knowstore.training import read_passages, read_rows

_WHOLE = SplitConfig(words=100_000)  # a row is a passage
_MOST_ALIKE = 10  # answers, or more where questions are equally alike, of which one takes the place of another


@dataclass(frozen=True)
class EditsConfig:
    """How many edit batches of how many passages, and which shares of them change what was there before.

    `audit_every` batches there is an audit of `sample` probes of each batch and kind; the last audit, after the last
    batch, asks `final_sample` of them, or all if None. 0 means that there is no other audit than the last. `batch_size`
    is `run_audit`'s.
    """

    n_batches: int = 40
    n_passages: int = 250
    updates: float = 0.10
    removals: float = 0.05
    contradictions: float = 0.05
    n_questions: int = 1
    audit_every: int = 0
    sample: int | None = None
    final_sample: int | None = None
    mode: Mode = "experts"
    seed: int = 0
    batch_size: int = 16

    @property
    def n_fresh(self) -> int:
        """How many passages that were not there before all batches need."""
        n_changed = round(self.updates * self.n_passages) + round(self.contradictions * self.n_passages)
        return self.n_batches * self.n_passages - (self.n_batches - 1) * n_changed

    def __post_init__(self) -> None:
        shares = (self.updates, self.removals, self.contradictions)
        if min(self.n_batches, self.n_passages, self.n_questions) < 1 or min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(
                f"{self.n_batches} batches of {self.n_passages} passages with shares {shares} cannot be made",
                kept="nothing was measured",
                fix="use at least 1 of each, and shares that sum to at most 1",
            )


@dataclass(frozen=True)
class Fact:
    """A passage and the questions on it that are asked, each with its accepted answers; none where it only fills."""

    passage: Passage
    questions: tuple[tuple[str, tuple[str, ...]], ...]

    def probes(self) -> list[Probe]:
        """The questions as probes of the passage."""
        passage_id = self.passage.passage_id
        return [Probe(question, answers, "reliability", passage_id) for question, answers in self.questions]


@dataclass(frozen=True)
class Step:
    """One edit batch: the sources as they are from then on, by name, and the probes that come with it."""

    sources: dict[str, list[Passage]]
    probes: list[Probe]


Placed = tuple[str, Fact]


def read_facts(paths: Sequence[Path], n_questions: int) -> list[Fact]:
    """Passages of QA files, each once, with up to `n_questions` questions whose first answer stands in it."""
    found: dict[str, tuple[Passage, list[tuple[str, tuple[str, ...]]]]] = {}
    for path in paths:
        for row in read_rows(path):
            if not isinstance(row.get("passage"), dict) or not row.get("answers"):
                continue
            passage = Passage(row["passage"]["text"], row["passage"]["title"])
            _, questions = found.setdefault(passage.passage_id, (passage, []))
            if len(questions) < n_questions and row["answers"][0] in passage.text:
                questions.append((row["question"], tuple(row["answers"])))
    return [Fact(passage, tuple(questions)) for passage, questions in found.values() if questions]


def with_filling(facts: Sequence[Fact], corpus: Sequence[Path], config: EditsConfig) -> tuple[list[Fact], list[Fact]]:
    """The facts, with as many passages of a corpus {title, text} that nobody asks for as the batches lack, and further
    ones for batches that change fewer passages than they might."""
    taken = {fact.passage.passage_id for fact in facts}
    passages = (passage for path in corpus for passage in read_passages(path))
    fillings = (Fact(one, ()) for one in passages if one.passage_id not in taken)
    filled = [*facts, *islice(fillings, max(0, config.n_fresh - len(facts)))]
    return filled, list(islice(fillings, max(0, config.n_batches * config.n_passages - len(filled))))


def make_steps(facts: Sequence[Fact], config: EditsConfig, reserve: Sequence[Fact] = ()) -> Iterator[Step]:
    """Edit batches of real passages in random order.

    From the second batch on a share of the passages are updates (an older passage of which the first answer is
    exchanged, in its place) and contradictions (the same, beside the older one), and a share of older passages is
    removed. Answers are exchanged for ones of like form to like questions on other passages. Where too few older
    passages have questions to be changed, new ones stand in for them, at last those of `reserve`.

    Raises:
        ConfigError: too few passages for so many batches.
    """
    draw = random.Random(config.seed)
    fresh = [*draw.sample(list(facts), len(facts)), *reserve]
    asked = sorted({(question, answers[0]) for fact in facts for question, answers in fact.questions})
    pool = [_Asked.read(question, answer) for question, answer in asked]
    sources: dict[str, list[Fact]] = {}
    for number in range(1, config.n_batches + 1):
        old = [(name, fact) for name, some in sources.items() for fact in some if fact.questions]
        draw.shuffle(old)
        shares = (config.updates, config.contradictions, config.removals) if number > 1 else (0.0, 0.0, 0.0)
        n_updated, n_contested, n_removed = (round(share * config.n_passages) for share in shares)
        updated, contested = _twins(old, n_updated, pool, draw), _twins(old, n_contested, pool, draw)
        removed = _spare_last(_take(old, n_removed), sources)
        n_new = config.n_passages - len(updated) - len(contested)
        if len(fresh) < n_new:
            raise ConfigError(
                f"the files hold {len(facts) + len(reserve)} passages, too few for {config.n_batches} batches",
                kept="nothing was measured",
                fix="give more files, or use fewer batches or passages",
            )
        new, fresh = fresh[:n_new], fresh[n_new:]
        name = f"batch-{number:03}.jsonl"
        sources[name] = [*new, *(twin for _, _, twin in contested)]
        probes = [probe for fact in sources[name] for probe in fact.probes()]
        for place, fact, twin in updated:
            sources[place][sources[place].index(fact)] = twin
            probes += twin.probes()
        for place, fact in removed:
            sources[place].remove(fact)
        touched = {name, *(place for place, _, _ in updated), *(place for place, _ in removed)}
        yield Step({place: [fact.passage for fact in sources[place]] for place in sorted(touched)}, probes)


def _take(old: list[Placed], n: int) -> list[Placed]:
    """The last `n` of a shuffled list, off it."""
    return [old.pop() for _ in range(min(n, len(old)))]


def _twins(old: list[Placed], n: int, pool: Sequence[_Asked], draw: random.Random) -> list[tuple[str, Fact, Fact]]:
    """The last `n` of a shuffled list that have a twin, each with it; they and those without one go off the list."""
    found: list[tuple[str, Fact, Fact]] = []
    while old and len(found) < n:
        place, fact = old.pop()
        twin = _twin(fact, pool, draw)
        if twin is not None:
            found.append((place, fact, twin))
    return found


def _spare_last(removed: list[Placed], sources: Mapping[str, Sequence[Fact]]) -> list[Placed]:
    """Without those whose source would be empty without them, which no file of passages can be."""
    counts = Counter(place for place, _ in removed)
    return [(place, fact) for place, fact in removed if counts[place] < len(sources[place])]


@dataclass(frozen=True)
class _Asked:
    """An answer, as it is compared, what it must share with another to stand in for it (numbers, names, length), and
    the words of its question."""

    answer: str
    normalised: str
    form: tuple[bool, bool, bool]
    words: frozenset[str]

    @classmethod
    def read(cls, question: str, answer: str) -> _Asked:
        plain = normalise(answer)
        form = any(letter.isdigit() for letter in answer), answer[:1].isupper(), len(plain.split()) > 2
        return cls(answer, plain, form, frozenset(normalise(question).split()))


def _twin(fact: Fact, pool: Sequence[_Asked], draw: random.Random) -> Fact | None:
    """The same passage with another first answer, one of the most alike in form and question among those of a pool;
    of its other questions those stay whose answer is still there. None where it would still tell the first answer, by
    its title or by other words for it."""
    (question, accepted), *others = fact.questions
    answer = accepted[0]
    own, text = _Asked.read(question, answer), f" {normalise(fact.passage.text)} "
    alike = [one for one in pool if one.form == own.form and f" {one.normalised} " not in text] or list(pool)
    shared = [len(one.words & own.words) / max(1, len(one.words | own.words)) for one in alike]
    least = sorted(shared, reverse=True)[:_MOST_ALIKE][-1]
    other = draw.choice([one.answer for one, share in zip(alike, shared, strict=True) if share >= least])
    whole = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
    passage = replace(fact.passage, text=whole.sub(lambda _: other, fact.passage.text))
    if holds_answer(f"{passage.title} {passage.text}", accepted):
        return None
    kept = [(asked, answers) for asked, answers in others if answers[0] in passage.text]
    return Fact(passage, ((question, (other,)), *kept))


def run_edits(
    data: Sequence[Path],
    output: Path,
    *,
    config: EditsConfig | None = None,
    corpus: Sequence[Path] = (),
    unrelated: Sequence[Probe] = (),
    models: ModelConfig | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, object]:
    """Let a new store in `output` live through many edit batches, audit it, and write `edits.json` and a report.

    Run again with the same arguments, it goes on where it was cut short; `config.json` beside the store says which.

    Args:
        data: QA files, see `read_facts`.
        corpus: files of passages {title, text} that fill the batches where the QA files have too few.
        unrelated: locality probes, which come with the first batch.

    Returns: `config`, `passages` that are live, `ingest_s` and `seconds` of this call, `audits` of {audit_id, batch_id,
        n, seconds}, and what `summarise` gives.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: too few passages for so many batches, or `output` holds a run of another config or of other files.
    """
    config = config or EditsConfig()
    filled, reserve = with_filling(read_facts(data, config.n_questions), corpus, config)
    steps = list(make_steps(filled, config, reserve))
    settings = asdict(config) | asdict(models or ModelConfig())
    keep_run(output / "config.json", settings, _digest(steps, unrelated), is_begun=(output / "store").exists())
    (output / "sources").mkdir(parents=True, exist_ok=True)
    started, ingest_s = time.perf_counter(), 0.0
    with KnowledgeStore.open(output / "store", models=models, on_progress=on_progress) as store:
        done = {batch.note: batch.id for batch in store.batches() if batch.state == "live"}
        for number, step in enumerate(steps, 1):
            note = f"edits {number} of {len(steps)}"
            if note not in done:
                began = time.perf_counter()
                done[note] = _ingest(store, output / "sources", step, note)
                ingest_s += time.perf_counter() - began
            probes = [*step.probes, *(unrelated if number == 1 else ())]
            add_probes(store, [(note, probe) for probe in probes], batch_id=done[note])
            is_last = number == len(steps)
            if is_last or (config.audit_every and number % config.audit_every == 0):
                sample = config.final_sample if is_last else config.sample
                _audit(store, config, sample, done[note], on_progress)
            if on_progress is not None:
                on_progress("edit batches", number, len(steps))
        found = {"config": asdict(config), **_measured(store, config.mode), "ingest_s": ingest_s}
        found["seconds"] = time.perf_counter() - started
        (output / "edits.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        write_report(store, output / "report.html")
    return found


def read_unrelated(path: Path, n: int) -> list[Probe]:
    """The first n questions of a file of rows {question or prompt, answers}, as locality probes.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: no question.
    """
    return [Probe(one.question, one.answers, "locality") for one in read_questions(path)[:n]]


def _digest(steps: Sequence[Step], unrelated: Sequence[Probe]) -> str:
    """What tells a sequence of edit batches and probes from another."""
    described = [asdict(step) for step in steps], [asdict(probe) for probe in unrelated]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _ingest(store: KnowledgeStore, folder: Path, step: Step, note: str) -> int:
    for name, passages in step.sources.items():
        rows = ({"title": one.title, "text": one.text} for one in passages)
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    report = store.ingest([str(folder / name) for name in step.sources], split=_WHOLE, strict=True, note=note)
    assert report.batch_id is not None
    return report.batch_id


def _audit(
    store: KnowledgeStore, config: EditsConfig, sample: int | None, at: int, on_progress: OnProgress | None
) -> None:
    """The audit after batch `at`, or what is left of it; nothing when it was finished, or the store went on."""
    log, selection = store.catalog.audits, Selection(sample=sample, seed=config.seed)

    def is_ours(one: Audit) -> bool:
        chosen = {name: one.options.get(name) for name in asdict(selection)}
        return (one.batch_id, one.mode) == (at, config.mode) and chosen == asdict(selection)

    if any(is_ours(one) for one in log.audits()) or store.catalog.head() != at:
        return
    is_cut_short = any(is_ours(one) for one in log.audits(finished=False)[-1:])
    run_audit(
        store, mode=config.mode, selection=selection, resume=is_cut_short, batch_size=config.batch_size,
        on_progress=on_progress,
    )  # fmt: skip


def _measured(store: KnowledgeStore, mode: Mode) -> dict[str, object]:
    log = store.catalog.audits
    audits = [
        {"audit_id": one.id, "batch_id": one.batch_id, "n": len(log.answers(one.id)), "seconds": one.seconds}
        for one in log.audits()
    ]
    return {"passages": store.catalog.count_live(), "audits": audits, **summarise(store, mode)}
