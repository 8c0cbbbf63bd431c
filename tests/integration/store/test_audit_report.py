"""The report of audits: one page that needs nothing else, hostile texts and all, and the same in three other forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from knowstore import KnowledgeStore, Passage
from knowstore.audits import add_probes, can_plot, run_audit, write_report
from knowstore.errors import ConfigError
from knowstore.records import Probe

Open = Callable[..., KnowledgeStore]
HOSTILE = "<script>alert('x')</script> & \"<img src=http://example.org/x onerror=y>\" | `=cmd` [a](b)\n# {{ 7 * 7 }}"


class Page(HTMLParser):
    """The tags of a page, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.said = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture
def audited(open_store: Open, facts: list[Passage]) -> KnowledgeStore:
    """Two audits of two batches, with hostile texts in every place."""
    store = open_store()
    store.add([*facts[:2], Passage(HOSTILE + " It opens in 1999.", HOSTILE)], note=HOSTILE)
    hostile = Passage(HOSTILE + " It opens in 1999.", HOSTILE).passage_id
    rows = [Probe(f"{HOSTILE} {n}", (f"={HOSTILE}",), "reliability", hostile) for n in range(4)]
    add_probes(store, [("", row) for row in rows])
    run_audit(store)
    store.add(facts[2:4])
    told = store.ask("Where does Lyon lie?").text
    add_probes(store, [("", Probe("Where does Lyon lie?", (told,), "reliability", facts[2].passage_id))])
    run_audit(store)
    return store


def test_the_page_needs_nothing_else_and_hostile_texts_stay_texts(audited: KnowledgeStore, tmp_path: Path) -> None:
    files = write_report(audited, tmp_path / "new" / "report.html")
    assert [file.name for file in files] == ["report.html", "report.json", "report.csv", "report.md"]
    page = Page(files[0].read_text("utf-8"))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert all(one.startswith(("#", "data:image/png")) for one in page.loaded)
    assert page.said.count(f"{HOSTILE} 3") >= 1
    assert "7 * 7" in page.said
    if can_plot():
        assert page.tags.count("svg") == 3
        assert len(page.ids) == len(set(page.ids)) > 1
    assert "<script" not in files[3].read_text("utf-8").replace("&lt;script", "")


def test_all_forms_say_the_same(audited: KnowledgeStore, tmp_path: Path) -> None:
    files = write_report(audited, tmp_path / "report.html")
    found = json.loads(files[1].read_text("utf-8"))
    [mode] = found["modes"]
    assert mode["matrix"] == [[0.0, None], [0.0, 1.0]]
    assert [batch["n_probes"] for batch in found["batches"]] == [4, 1]
    assert [point["batch_id"] for point in mode["trend"]] == [1, 2]
    with files[2].open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["question"], float(row["now_em"])) for row in rows] == [
        (one["question"], one["now_em"]) for one in mode["questions"]
    ]
    assert {row["answers"][:2] for row in rows[:4]} == {"'="}
    assert sum(expert["weight"] for expert in mode["questions"][0]["experts"]) == pytest.approx(1)
    markdown = files[3].read_text("utf-8")
    assert "| 2 | 0.0 % | 100.0 % |" in markdown
    assert Page(files[0].read_text("utf-8")).said.count("50.0 %") >= 1
    changed = mode["changed"]
    assert changed["n"] == 4
    assert changed["unchanged"] + changed["gained"] + changed["lost"] + changed["other words"] == 4


def test_the_page_shows_so_many_questions_and_says_where_the_others_are(
    audited: KnowledgeStore, tmp_path: Path
) -> None:
    [html, *_] = write_report(audited, tmp_path / "report.html", n_questions=1)
    assert "3 more are in the CSV and JSON files" in Page(html.read_text("utf-8")).said


def test_audits_of_more_probes_than_before_are_said_to_compare_different_questions(
    audited: KnowledgeStore, tmp_path: Path
) -> None:
    said, of_bwt = "compare different questions", "partly of other questions"
    files = write_report(audited, tmp_path / "even.html")
    assert not any(text in file.read_text("utf-8") for file in files for text in (said, of_bwt))
    more = Probe("When was Rome founded?", ("x",), "reliability", None)
    add_probes(audited, [("", more)], batch_id=1)
    run_audit(audited)
    files = write_report(audited, tmp_path / "uneven.html")
    for text in (said, of_bwt):
        assert [file.suffix for file in files if text in file.read_text("utf-8")] == [".html", ".md"]


def test_what_the_model_alone_says_and_which_experts_count_are_shown(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    store = open_store()
    store.add(facts[:3])
    add_probes(store, [("", Probe("Who wrote Faust?", (), "locality")), ("", Probe("Who?", ("x",), "reliability"))])
    run_audit(store)
    files = write_report(store, tmp_path / "report.html")
    page = Page(files[0].read_text("utf-8"))
    assert page.said.count("model alone:") == 1
    assert page.said.index("Who?") < page.said.index("Who wrote Faust?")
    for mode in json.loads(files[1].read_text("utf-8"))["modes"]:
        assert [one["untouched"] is None for one in mode["questions"]] == [False, True]
    assert json.loads(files[1].read_text("utf-8"))["models"]["llm"] == Path(store.models.config.llm).name


def test_without_matplotlib_the_matrix_is_a_table(
    audited: KnowledgeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knowstore.audits.report.can_plot", lambda: False)
    [html, *_] = write_report(audited, tmp_path / "report.html")
    page = Page(html.read_text("utf-8"))
    assert "svg" not in page.tags
    assert "matplotlib is not installed" in page.said


def test_nothing_audited_is_an_error_and_nothing_is_written(
    open_store: Open, facts: list[Passage], tmp_path: Path
) -> None:
    store = open_store()
    store.add(facts[:1])
    with pytest.raises(ConfigError, match="no audit was finished"):
        write_report(store, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_a_name_that_would_overwrite_itself_is_refused(audited: KnowledgeStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="suffix"):
        write_report(audited, tmp_path / "report.json")
