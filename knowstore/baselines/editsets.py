"""One loader for edit sets: CounterFact, zsRE, MQuAKE, TempLAMA, UnKE, PopQA with counterfactual twins, NQ-Swap, and
any file of questions on passages. A set is told by the keys of its rows.

Every prompt is asked as a question, so that all methods answer in one form: a cloze gets "what" where its answer
stands, `The mother tongue of Danielle Darrieux is` becomes `The mother tongue of Danielle Darrieux is what?`. A set
without passages gets one of a sentence, the prompt with its new answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from knowstore.baselines.edits import Edit, EditProbe, EditRow, Kind, TaughtFact
from knowstore.errors import ConfigError
from knowstore.records import Passage
from knowstore.training import read_rows

Row = dict[str, Any]

_SLOT = "_X_"
_NAME = re.compile(r"[A-Z0-9][\w'’.-]*(?: (?:of|the|de|la|and) (?=[A-Z])| (?=[A-Z0-9]))?")


def load_edits(path: Path, *, n_facts: int = 2) -> list[EditRow]:
    """The rows of an edit set, or of a file of questions on passages, `.jsonl` or `.jsonl.gz`.

    Questions on one passage become one row: up to `n_facts` of them are taught, the first of these is asked as
    `efficacy`, and one that is not taught as `unseen`, where there is one.

    Raises:
        TrainingError: a file that cannot be read.
        ConfigError: rows of no known form.
    """
    rows = [row for row in read_rows(path) if row.get("target_new") != ""]  # some rows of zsRE teach nothing
    try:
        if rows and "passage" in rows[0] and "counterfactual_text" not in rows[0]:
            return _passage_rows(rows, n_facts)
        return [_reader(row)(row) for row in rows]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"{path} holds a row of no known edit set ({type(error).__name__}: {error})",
            kept="nothing was measured",
            fix="give edits {subject, prompt, target_new, ...} or questions {question, answers, passage}",
        ) from error


def draw_edits(rows: Sequence[EditRow], limit: int, seed: int) -> list[EditRow]:
    """`limit` rows drawn with `seed`; one without a neighbourhood gets the question of a row that was not drawn, with
    what is right there while it is not taught, as far as there are questions that no drawn row teaches or asks."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    drawn = {_folded(question) for row in order[:limit] for question in row.questions}
    others = [
        row
        for row in order[limit:]
        if row.probes and row.untaught_answers and _folded(row.probes[0].question) not in drawn
    ]
    return [
        replace(row, probes=(*row.probes, EditProbe("neighbourhood", other.probes[0].question, other.untaught_answers)))
        if other is not None and all(probe.kind != "neighbourhood" for probe in row.probes)
        else row
        for place, row in enumerate(order[:limit])
        for other in [others[place % len(others)] if others else None]
    ]


def _folded(question: str) -> str:
    return " ".join(question.casefold().split())


def as_question(prompt: str) -> str:
    """A prompt as a question: questions as they are, a cloze with "what" where its answer stands."""
    prompt = " ".join(prompt.split())
    if _SLOT in prompt:
        return prompt.replace(_SLOT, "what").rstrip(".") + "?"
    return prompt if prompt.endswith("?") else f"{prompt} what?"


def statement(prompt: str, target: str) -> str:
    """A sentence that states the answer to a prompt."""
    prompt = " ".join(prompt.split())
    if _SLOT in prompt:
        return prompt.replace(_SLOT, target)
    return f"{prompt} {target.rstrip('.')}."


def subject_of(question: str, title: str) -> str:
    """What a question is about: the title it names, else its longest name behind the first word, else its longest
    word. A rule in place of the paper's prompt to a large model (its Table 8)."""
    if title and title in question:
        return title
    first_blank = question.find(" ")
    names = [found.strip() for found in _runs(question[first_blank + 1 :])]
    words = question.rstrip("?").split()
    return max(names or words, key=len, default="").rstrip(".?,").removesuffix("'s").removesuffix("’s")


def _runs(text: str) -> list[str]:
    """Neighbouring capitalised words as one name each."""
    runs: list[str] = []
    run, end = "", 0
    for found in _NAME.finditer(text):
        if run and found.start() != end:
            runs.append(run)
            run = ""
        run, end = run + found.group(), found.end()
    return [*runs, run] if run else runs


def _reader(row: Row) -> Callable[[Row], EditRow]:
    if "edits" in row:
        return _mquake
    if "date_old" in row:
        return _temporal
    if "sub_questions" in row:
        return _long_form
    return _counterfactual_twin if "counterfactual_text" in row else _prompt_edit


def _prompt_edit(row: Row) -> EditRow:
    """CounterFact and zsRE."""
    edit = _edit(row["subject"], row["prompt"], row["target_new"], row.get("evidence"))
    return EditRow(row["id"], (edit,), (*_own_probes(row), *_neighbours(row)), _untaught(row))


def _edit(subject: str, prompt: str, target: str, evidence: str | None = None) -> Edit:
    text = evidence if evidence and target in evidence else statement(prompt, target)
    return Edit(Passage(text, subject), (TaughtFact(as_question(prompt), subject, target),))


def _own_probes(row: Row, edits: tuple[int, ...] = (0,)) -> list[EditProbe]:
    answers = tuple(row.get("answers_new") or [row["target_new"]])
    return [
        EditProbe("efficacy", as_question(row["prompt"]), answers, edits),
        *_probes("paraphrase", ((as_question(prompt), answers) for prompt in row["paraphrases"]), edits),
    ]


def _untaught(row: Row) -> tuple[str, ...]:
    return tuple(answer for answer in row.get("answers_old") or [row.get("target_old")] if answer)


def _neighbours(row: Row) -> list[EditProbe]:
    return _probes(
        "neighbourhood", ((as_question(one["prompt"]), (one["target"],)) for one in row["neighbourhood"]), (0,)
    )


def _probes(kind: Kind, asked: Iterable[tuple[str, tuple[str, ...]]], edits: tuple[int, ...]) -> list[EditProbe]:
    return [EditProbe(kind, question, answers, edits) for question, answers in asked]


def _mquake(row: Row) -> EditRow:
    """Several edits of a case, and questions that need all of them."""
    edits = tuple(_edit(one["subject"], one["prompt"], one["target_new"], one.get("evidence")) for one in row["edits"])
    everything = tuple(range(len(edits)))
    answers = tuple(row["multihop_answer_new"])
    hops = _probes("portability", ((question, answers) for question in row["multihop_questions"]), everything)
    return EditRow(row["id"], edits, (*_own_probes(row), *hops), _untaught(row))


def _temporal(row: Row) -> EditRow:
    """TempLAMA: the older fact is taught first, and the newer one supersedes it."""
    edits = []
    for age in ("old", "new"):
        target, date = row[f"target_{age}"], row[f"date_{age}"]
        edit = _edit(row["subject"], row["prompt"], target)
        text = f"In {date}, {statement(row['prompt'], target)}"
        edits.append(replace(edit, passage=Passage(text, row["subject"], date=date)))
    return EditRow(row["id"], tuple(edits), tuple(_own_probes(row, (1,))), _untaught(row))


def _long_form(row: Row) -> EditRow:
    """UnKE: the answer is a text of its own, which is the passage."""
    subject = row["subject"] or subject_of(row["prompt"], "")
    edit = Edit(
        Passage(row["target_new"], subject), (TaughtFact(as_question(row["prompt"]), subject, row["target_new"]),)
    )
    parts = _probes("unseen", ((one["question"], (one["answer"],)) for one in row["sub_questions"]), (0,))
    return EditRow(row["id"], (edit,), (*_own_probes(row), *parts), _untaught(row))


def _counterfactual_twin(row: Row) -> EditRow:
    """PopQA by DynamicQA: the passage with another object in the true one's place."""
    title, target = row["passage"]["title"], row["counterfactual_answer"]
    fact = TaughtFact(row["question"], subject_of(row["question"], title), target)
    edit = Edit(Passage(row["counterfactual_text"], title), (fact,))
    probes = (EditProbe("efficacy", fact.question, (target,)),)
    return EditRow(row["id"], (edit,), probes, tuple(row["answers"]))


def _passage_rows(rows: Sequence[Row], n_facts: int) -> list[EditRow]:
    """Questions on passages (NQ-Swap among them), a row for each passage."""
    by_passage: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_passage.setdefault((row["passage"]["title"], row["passage"]["text"]), []).append(row)
    return [_passage_row(title, text, some, n_facts) for (title, text), some in by_passage.items()]


def _passage_row(title: str, text: str, rows: Sequence[Row], n_facts: int) -> EditRow:
    n_taught = max(1, min(n_facts, len(rows) - 1))
    facts = [
        TaughtFact(row["question"], subject_of(row["question"], title), row["answers"][0]) for row in rows[:n_taught]
    ]
    probes = [EditProbe("efficacy", facts[0].question, tuple(rows[0]["answers"]))]
    probes += [EditProbe("unseen", row["question"], tuple(row["answers"])) for row in rows[n_taught : n_taught + 1]]
    edit = Edit(Passage(text, title), tuple(facts))
    untaught = tuple(rows[0].get("original_answers") or rows[0]["answers"])
    return EditRow(str(rows[0].get("id", "")), (edit,), tuple(probes), untaught)
