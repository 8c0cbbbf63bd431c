"""What becomes of failures, and the forms of output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from knowstore.cli.output import Output, count, shortened, size
from knowstore.cli.registration import _bounded
from knowstore.cli.session import Session
from knowstore.errors import BankError


@pytest.fixture(autouse=True)
def _without_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KNOWSTORE_DEBUG", raising=False)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _raising(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def _exit_code(session: Session, error: BaseException) -> int:
    with pytest.raises(typer.Exit) as raised:
        _bounded(session, _raising(error))
    return raised.value.exit_code


def test_an_error_is_its_three_parts_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(Session(), BankError("it broke", "the rest", "mend it")) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "Error: it broke\nKept: the rest\nFix: mend it\n"


def test_an_error_is_an_object_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(Session(output=Output(as_json=True)), BankError("it broke", "the rest", "mend it")) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": {"what": "it broke", "kept": "the rest", "fix": "mend it"}}
    assert shown.err == ""


def test_an_interrupt_says_what_was_kept_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert _exit_code(Session(kept="the first half"), KeyboardInterrupt()) == 130
    assert "interrupted\nKept: the first half\nFix: " in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("odd"), OSError(28, "No space left on device")])
def test_a_fault_shows_no_traceback_unless_asked(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _exit_code(Session(), error) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("KNOWSTORE_DEBUG", "1")
    assert _exit_code(Session(), error) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_closed_streams_swallow_what_is_written(closed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from knowstore.cli import main; main()", "--json", "--store", "none", "list"]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_wrong_usage_passes_the_boundary() -> None:
    with pytest.raises(typer.BadParameter):
        _bounded(Session(), _raising(typer.BadParameter("no")))


def test_json_holds_no_number_that_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True).result({"scores": (1.5, float("-inf"), float("nan")), "text": "né\n"}, "")
    assert json.loads(capsys.readouterr().out) == {"scores": [1.5, None, None], "text": "né\n"}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_json_on_a_stream_of_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding, errors="backslashreplace"))
    Output(as_json=True).result({"text": "Rhône \u2019 \U0001f600"}, "")
    assert json.loads(written.getvalue().decode("utf-8")) == {"text": "Rhône \u2019 \U0001f600"}


def test_json_holds_no_byte_that_is_not_utf8(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(os.fsdecode(b"out\xff"))
    Output(as_json=True).result({"folder": str(path), "paths": [path], str(path): 1}, "")
    assert json.loads(capsys.readouterr().out) == {"folder": "out\ufffd", "paths": ["out\ufffd"], "out\ufffd": 1}


def test_quiet_writes_ids_and_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(is_quiet=True)
    output.result({"batch_id": 7}, "Edit batch 7", [7])
    output.hint("go on")
    assert capsys.readouterr() == ("7\n", "")


def test_what_landed_is_shown_before_what_follows_and_in_one_object_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    plain, as_json = Output(), Output(as_json=True)
    plain.landed({"batch_id": 7}, "Edit batch 7")
    assert capsys.readouterr().out == "Edit batch 7\n"
    as_json.landed({"batch_id": 7}, "Edit batch 7")
    assert capsys.readouterr().out == ""
    assert _exit_code(Session(output=as_json), BankError("it broke", "the rest", "mend it")) == 1
    error = {"what": "it broke", "kept": "the rest", "fix": "mend it"}
    assert json.loads(capsys.readouterr().out) == {"batch_id": 7, "error": error}


def test_a_table_that_is_piped_is_tab_separated(capsys: pytest.CaptureFixture[str]) -> None:
    Output().table([{"id": 1, "text": "two\nlines\there"}], ["id", "text"])
    assert capsys.readouterr().out == "id\ttext\n1\ttwo lines here\n"


def test_stored_text_cannot_steer_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    Output().result({}, "a\x1b[2Jb [bold]c[/bold]")
    Output().table([{"title": "\x1b]0;owned\x07 [red]x"}], ["title"])
    shown = terminal.getvalue()
    assert "\x1b[2J" not in shown
    assert "\x1b]0" not in shown
    assert "[bold]c[/bold]" in shown
    assert "[red]x" in shown


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output()
    output.progress("reading", 1, 2)
    output.progress.stop()
    assert capsys.readouterr() == ("", "")


def test_numbers_and_texts_are_for_people() -> None:
    assert (size(35_200_000), size(999)) == ("35 MB", "999 bytes")
    assert (count(1, "edit batch"), count(2000, "edit batch")) == ("1 edit batch", "2,000 edit batches")
    assert shortened("one\n two  three", 10) == "one two t…"
