"""The only printer: results to stdout; progress, hints, questions and errors to stderr."""

from __future__ import annotations

import json
import math
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, TextIO

from knowstore.errors import KnowledgeStoreError
from knowstore.records import well_formed

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, object]

_CUT = ("passage", "text", "title")  # columns of which a terminal shows as much as fits on the line
_LEAST, _LONG = 12, 32


class Output:
    """What a command says, in the form that was asked for.

    `as_json` puts one JSON object on stdout and nothing else, `is_quiet` only ids or the bare answer; both
    leave hints out.
    """

    def __init__(self, *, as_json: bool = False, is_quiet: bool = False) -> None:
        self.as_json, self.is_quiet = as_json, is_quiet
        self.progress = Progress()
        self._landed: dict[str, object] = {}

    @property
    def is_plain(self) -> bool:
        """Whether text for people is wanted, and not JSON or bare ids."""
        return not (self.as_json or self.is_quiet)

    @property
    def streams(self) -> bool:
        """Whether an answer is shown while it is generated."""
        return self.is_plain and sys.stdout.isatty()

    def landed(self, record: Row, text: str, ids: Iterable[object] = ()) -> None:
        """What a command has done before it goes on: shown at once, with `as_json` in the one object that follows, be
        it a result or an error."""
        if self.as_json:
            self._landed |= record
        else:
            self.result(record, text, ids)

    def result(self, record: Row, text: str, ids: Iterable[object] = ()) -> None:
        """A command's result in one of its three forms."""
        if self.as_json:
            is_escaped = not _is_utf8(sys.stdout)
            shown = _json_value({**self._landed, **record})
            self._out(json.dumps(shown, ensure_ascii=is_escaped, allow_nan=False))
        elif self.is_quiet:
            for one in ids:
                self._out(str(one))
        elif text:
            self._out(text)

    def listing(
        self, name: str, rows: Sequence[Row], columns: Sequence[str], *, id_column: str, **more: object
    ) -> None:
        """Rows: `{name: rows, **more}` as JSON, one id a line when quiet, else a table of `columns`."""
        if self.is_plain:
            self.table(rows, columns)
        else:
            self.result({name: rows, **more}, "", [row[id_column] for row in rows])

    def table(self, rows: Sequence[Row], columns: Sequence[str], *, title: str = "", to_stderr: bool = False) -> None:
        """A table on a terminal; tab-separated lines, the first with the column names, elsewhere."""
        self.progress.stop()
        stream = sys.stderr if to_stderr else sys.stdout
        cells = [[_cell(row.get(column)) for column in columns] for row in rows]
        if not stream.isatty():
            for line in [list(columns), *cells]:
                print("\t".join(" ".join(cell.split()) for cell in line), file=stream, flush=True)
            return
        from rich.table import Table
        from rich.text import Text

        console = _console(stream)
        table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for column, n_chars in zip(columns, _widths(columns, cells, console.width), strict=True):
            table.add_column(
                column.replace("_", " "),
                min_width=n_chars if column.endswith("id") else None,  # an id that is cut is of no use
                max_width=n_chars,
                no_wrap=n_chars is not None,
                overflow="ellipsis",
            )
        for line in cells:
            table.add_row(*(Text(_visible(cell, stream)) for cell in line))
        console.print(table)

    def stream(self, text: str) -> None:
        """A piece of an answer as it is generated."""
        self.progress.stop()
        print(_visible(text, sys.stdout), end="", flush=True)

    def hint(self, text: str) -> None:
        """A next step, or what else is good to know."""
        if self.is_plain:
            self.note(f"Hint: {text}")

    def note(self, text: str) -> None:
        """A line on stderr that belongs to no result."""
        if not self.is_quiet:
            self._err(text)

    def error(self, error: KnowledgeStoreError) -> None:
        """An error's three parts; with `as_json` an object on stdout."""
        if self.as_json:
            self.result({"error": {"what": error.what, "kept": error.kept, "fix": error.fix}}, "")
        else:
            self._err(f"Error: {error}")

    def traceback(self, error: BaseException) -> None:
        """The whole traceback, for whoever mends knowstore."""
        import traceback

        self._err("".join(traceback.format_exception(error)).rstrip())

    def ask_line(self, prompt: str) -> str | None:
        """A line typed at the terminal, None at its end."""
        self.progress.stop()
        print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            print(file=sys.stderr, flush=True)
        return line.strip() if line else None

    def confirm(self, question: str) -> bool:
        """Ask yes or no at the terminal; only `y` or `yes` is a yes."""
        return (self.ask_line(f"{question} [y/N] ") or "").casefold() in ("y", "yes")

    def _out(self, text: str) -> None:
        self.progress.stop()
        print(_visible(text, sys.stdout), flush=True)

    def _err(self, text: str) -> None:
        self.progress.stop()
        print(_visible(text, sys.stderr), file=sys.stderr, flush=True)


class Progress:
    """Bars with rate and time left on stderr, when it is a terminal; each stage has its own.

    Called as `progress(stage, done, total)`; a total of None or 0 means that nobody knows it.
    """

    def __init__(self, *, is_shown: bool = True) -> None:
        self.is_shown = is_shown
        self._bars: Any = None
        self._stages: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int | None = None, detail: str = "") -> None:
        if not self.is_shown or not sys.stderr.isatty():
            return
        if self._bars is None:
            self._bars = _progress_bars()
            self._bars.start()
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total or None, detail="")
        self._bars.update(self._stages[stage], completed=done, total=total or None, detail=detail)
        if self._bars.finished:
            self.stop()

    def stop(self) -> None:
        """Take the bars off the terminal."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
            self._stages.clear()


def _progress_bars() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}", markup=False),
    )
    return Bars(*columns, console=_console(sys.stderr), transient=True)


def _console(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=stream, markup=False, highlight=False, emoji=False)


def _widths(columns: Sequence[str], cells: Sequence[Sequence[str]], n_chars: int) -> list[int | None]:
    """Widths for a line of `n_chars`: short columns whole, texts share what is left, others wrap."""
    longest = [max([len(column), *map(len, line)]) for column, *line in zip(columns, *cells, strict=True)]
    taken = sum(
        2 + (min(long, _LONG) if column not in _CUT else 0) for column, long in zip(columns, longest, strict=True)
    )
    share = max(_LEAST, (n_chars - taken) // max(1, sum(column in _CUT for column in columns)))
    return [
        share if column in _CUT else long if long <= _LONG else None
        for column, long in zip(columns, longest, strict=True)
    ]


def _is_utf8(stream: TextIO) -> bool:
    """Whether every text can be written as it is; a stream of no encoding is one in memory."""
    return (stream.encoding or "utf-8").lower().replace("_", "-") in ("utf-8", "utf8")


_SHOWN = "\n\t\u00ad\u200c\u200d"  # the joiners and the soft hyphen of words and emoji too


def _visible(text: str, stream: IO[str]) -> str:
    """On a terminal, without the control characters by which a stored text could rewrite the screen."""
    if not stream.isatty():
        return text
    return "".join(c if c in _SHOWN or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else "\ufffd" for c in text)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)


def _json_value(value: object) -> object:
    """The same without what JSON cannot hold: a number that is not finite is null, and what is no character, such as a
    byte of a path that is not UTF-8, is U+FFFD."""
    if isinstance(value, Mapping):
        return {well_formed(str(key)): _json_value(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_json_value(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, str):
        return well_formed(value)
    return value.isoformat() if hasattr(value, "isoformat") else well_formed(str(value))


def size(n_bytes: float) -> str:
    """Bytes for people: `35 MB`."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def count(number: int, noun: str) -> str:
    """`1 passage`, `2,000 passages`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def shortened(text: str, n_chars: int = 70) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= n_chars else line[: n_chars - 1].rstrip() + "…"
