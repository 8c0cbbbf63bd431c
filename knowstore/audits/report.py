"""The report of all audits: one HTML file that needs no network, and the same as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from knowstore._drawing import can_plot
from knowstore.audits.figures import curves, heatmap
from knowstore.audits.history import Row, gather
from knowstore.audits.results import tells
from knowstore.errors import ConfigError
from knowstore.store import KnowledgeStore

_COLUMNS = (
    "mode", "batch_id", "probe_id", "kind", "state", "question", "answers", "newer_answers", "then_after", "then",
    "then_em", "then_f1", "now_after", "now_state", "now", "now_em", "now_f1", "untouched", "rank", "experts",
)  # fmt: skip
_CURVES = {
    "em": "exact answers", "f1": "F1", "locality": "unrelated, as before", "newer": "newer beats older",
    "leaked": "removed, leaked",
}  # fmt: skip
_UNEVEN = (
    "Some audits asked other probes of a batch than others did: the matrix, the curves and BWT compare different "
    "questions, the change of the same probes does not."
)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet's formula begins


def write_report(store: KnowledgeStore, output: Path, *, n_questions: int = 100) -> list[Path]:
    """Write what all finished audits of a store found.

    Args:
        output: the HTML file; JSON, CSV (a row for each question) and Markdown stand beside it, with its name.
        n_questions: how many questions of each batch the HTML shows, first those that were lost; the others are in
            the JSON and the CSV.

    Returns: the four files.

    Raises:
        ConfigError: no audit was finished, or the file cannot be written.
    """
    found = gather(store)
    if not found["modes"]:
        raise ConfigError("no audit was finished yet", kept="nothing was written", fix="run `knowstore audit` first")
    texts = {
        output: render_html(found, n_questions=n_questions),
        output.with_suffix(".json"): json.dumps(found, ensure_ascii=False, indent=1) + "\n",
        output.with_suffix(".csv"): render_csv(found),
        output.with_suffix(".md"): render_markdown(found),
    }
    if len(texts) < 4:
        raise ConfigError(
            f"{output} has the suffix of one of the files beside it", kept="nothing was written",
            fix="give the HTML file's name, such as report.html",
        )  # fmt: skip
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, "utf-8", newline="")
    except OSError as error:
        raise ConfigError(
            f"{output} cannot be written: {error}",
            kept="the store is as it was",
            fix="name a file in a folder of yours",
        ) from error
    return list(texts)


def render_html(found: Row, *, n_questions: int) -> str:
    """The page; everything that came from passages, probes or models is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "points": points, "between": between}
    template = environment.from_string(resources.files("knowstore.audits").joinpath("report.html").read_text("utf-8"))
    modes = [
        {
            **mode,
            "figures": [Markup(figure) for figure in _figures(mode)],
            "by_batch": _by_batch(mode, n_questions),
            "uneven": _UNEVEN if mode["uneven"] else "",
        }
        for mode in found["modes"]
    ]
    return template.render({**found, "modes": modes})


def _figures(mode: Row) -> list[str]:
    if not can_plot() or not mode["matrix"]:
        return []
    trend = _last_of_each_batch(mode["trend"])
    after = [point["batch_id"] for point in trend]
    series = {label: [point[name] for point in trend] for name, label in _CURVES.items()}
    return [
        heatmap(mode["matrix"], mode["audited"], mode["batches"], "exact answers"),
        heatmap(mode["matrix_f1"], mode["audited"], mode["batches"], "F1"),
        curves(after, {name: values for name, values in series.items() if set(values) != {None}}, "Curves over audits"),
    ]


def _last_of_each_batch(trend: Sequence[Row]) -> list[Row]:
    return list({point["batch_id"]: point for point in trend}.values())


def _by_batch(mode: Row, n_questions: int) -> list[Row]:
    """For each batch its figures and the questions to show: lost ones and removed ones that are told first, then those
    answered wrong; those that no passage is to answer come last."""
    out = []
    for batch_id in sorted({question["batch_id"] for question in mode["questions"]}):
        questions = [question for question in mode["questions"] if question["batch_id"] == batch_id]
        current = [one for one in questions if one["state"] == "current" and one["kind"] != "locality"]
        order = sorted(questions, key=_urgency)
        out.append(
            {
                "batch_id": batch_id,
                "n": len(current),
                "then": _mean(one["then_em"] for one in current),
                "now": _mean(one["now_em"] for one in current),
                "now_f1": _mean(one["now_f1"] for one in current),
                "states": {state: sum(one["state"] == state for one in questions) for state in ("contested", "gone")},
                "n_all": len(questions),
                "questions": order[:n_questions],
            }
        )
    return out


def _urgency(question: Row) -> tuple[bool, float, float]:
    if question["now_state"] == "gone":
        is_told = tells(question["now"], question["now_em"], question["answers"])
        return False, -1.0 if is_told else 1.0, question["now_em"]
    is_last = question["kind"] == "locality" or question["state"] == "gone"
    return is_last, question["now_em"] - question["then_em"], question["now_em"]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def render_csv(found: Row) -> str:
    """One row a question and mode; texts that a spreadsheet would run as a formula begin with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(_COLUMNS)
    for mode in found["modes"]:
        for question in mode["questions"]:
            experts = " | ".join(f"{one['passage_id']} {one['weight']:.3f}" for one in question["experts"])
            row = {**question, "mode": mode["mode"], "experts": experts}
            row |= {name: " | ".join(question[name]) for name in ("answers", "newer_answers")}
            writer.writerow([_safe_cell(row[name]) for name in _COLUMNS])
    return out.getvalue()


def _safe_cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def render_markdown(found: Row) -> str:
    """Figures, matrix and changes of each mode."""
    lines = [f"# Audits of {_plain(found['store'])}", "", f"Written {found['created_at']}.", ""]
    for mode in found["modes"]:
        lines += [
            f"## Mode {mode['mode']}",
            "",
            *_markdown_table(("figure", "value", "95 %", "n"), headlines(mode)),
            "",
        ]
        if mode["uneven"]:
            lines += [_UNEVEN, ""]
        if mode["answered_otherwise"]:
            batches = " and ".join(str(batch) for batch in mode["answered_otherwise"])
            lines += [f"Models or settings were others from the audit after batch {batches} on: "
                      "what differs there may be due to them.", ""]  # fmt: skip
        for name, label in (("matrix", "exact answers"), ("matrix_f1", "F1")):
            rows = [
                (str(after), *(percent(value) for value in row))
                for after, row in zip(mode["audited"], mode[name], strict=True)
            ]
            head = ("after batch", *(f"batch {batch}" for batch in mode["batches"]))
            lines += [f"### Forgetting matrix, {label}", "", *_markdown_table(head, rows), ""]
        lines += _markdown_changes(mode["changed"])
    return "\n".join(lines)


def headlines(mode: Row) -> list[tuple[str, str, str, str]]:
    """A mode's figures in words: name, value, interval, n."""
    n = sum(sum(row) for row in mode["matrix_n"][-1:])
    local, both, residue = mode["locality"], mode["contradictions"]["both_retrieved"], mode["residue"]
    of_other = ", partly of other questions" if mode["uneven"] else ""
    same: Row = mode["same_probes"]["em"] if mode["same_probes"] else {"change": None, "change_ci": None, "n": 0}
    return [
        ("exact answers, mean over batches", percent(mode["average"]), between(mode["average_ci"]), str(n)),
        ("F1, mean over batches", percent(mode["average_f1"]), between(mode["average_f1_ci"]), str(n)),
        ("change of the same probes", points(same["change"]), between(same["change_ci"]), str(same["n"])),
        (f"BWT, exact answers{of_other}", points(mode["bwt"]), "", ""),
        ("forward effect, exact answers", points(mode["forward"]), "", ""),
        ("unrelated questions answered as before", percent(local["same"]), between(local["same_ci"]), str(local["n"])),
        ("newer beats older", percent(both["rate"]), between(both["rate_ci"]), str(both["newer"] + both["older"])),
        ("removed facts still told", percent(residue["still"]), between(residue["still_ci"]), str(residue["n"])),
        ("of which nothing explains", percent(residue["rate"]), between(residue["rate_ci"]), str(residue["n"])),
    ]  # fmt: skip


def _markdown_changes(changed: Row) -> list[str]:
    lines = [
        "### Since the audit before", "",
        f"{changed['n']} questions asked both times: {changed['gained']} gained, {changed['lost']} lost, "
        f"{changed['other words']} in other words, {changed['unchanged']} unchanged.", "",
    ]  # fmt: skip
    rows = [
        (row["change"], str(row["batch_id"]), row["question"], row["before"], row["now"]) for row in changed["rows"]
    ]
    return [*lines, *_markdown_table(("change", "batch", "question", "before", "now"), rows), ""] if rows else lines


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(_plain(cell) for cell in row)} |" for row in (head, ("---",) * len(head), *rows)
    ]  # fmt: skip


def _plain(text: str) -> str:
    """A text on one line in which Markdown and HTML find nothing of theirs."""
    if text == "---":
        return text
    escaped = "".join(f"\\{letter}" if letter in "\\`*_[]|#~!" else letter for letter in " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def percent(value: float | None) -> str:
    """A fraction for people; a dash when there is none."""
    return "–" if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of fractions in points of a percent."""
    return "–" if value is None else f"{100 * value:+.1f}"


def between(interval: Sequence[float] | None) -> str:
    """An interval of fractions in percent."""
    return "" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
