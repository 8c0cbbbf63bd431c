"""Pictures of methods that teach, by matplotlib (extra `plots`), which is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowstore._drawing import new_figure
from knowstore.bench.plots import percent_spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GREY = "#9aa5b1"
_KIND_COLOURS = {
    "efficacy": "#2f6f9f",
    "paraphrase": "#6aa7cf",
    "unseen": "#c6a15b",
    "portability": "#8a6fb0",
    "neighbourhood": "#9aa5b1",
}
_LINES = ("#2f6f9f", "#b8646a", "#c6a15b", "#4f9a6b", "#8a6fb0", "#6b4f3a", "#3aa6a6")
_N_COLUMNS = 3


def plot_methods(rows: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_methods` found: for each file exact answers by method and kind of probe (of the neighbourhood, the
    share of unchanged answers) with 95 % intervals, and beside it what teaching a passage takes and keeps.

    Args:
        rows, costs: as `run_methods` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    files = list(dict.fromkeys(str(row["data"]) for row in rows))
    n = max(sum(row["data"] == name for row in rows) for name in files)
    figure = new_figure(12.0, len(files) * (1.6 + 0.22 * n))
    axes = figure.subplots(len(files), 3, squeeze=False, width_ratios=(4, 1.4, 1.4))
    for (scores, seconds, kept), name in zip(axes, files, strict=True):
        _draw_scores(scores, [row for row in rows if row["data"] == name])
        some = [cost for cost in costs if cost["data"] == name]
        scores.set_title(f"{name}: {some[0]['passages']} passages, {some[0]['setting']}", fontsize=10)
        _draw_costs(seconds, some, "injection_s_per_passage", "seconds to teach a passage")
        _draw_costs(kept, some, "kept_bytes_per_passage", "bytes kept for a passage")
    figure.savefig(path)


def _draw_scores(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A group of bars for each method, one for each kind of probe."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    kinds = [kind for kind in _KIND_COLOURS if any(row["kind"] == kind for row in rows)]
    height = 0.8 / len(kinds)
    for position, kind in enumerate(kinds):
        some = [row for row in rows if row["kind"] == kind]
        score = "unchanged" if kind == "neighbourhood" else "em"
        values = [100 * row[score] for row in some]
        bounds = percent_spread(some, score)
        places = [methods.index(row["method"]) + height * (position - (len(kinds) - 1) / 2) for row in some]
        label = f"{kind}, unchanged" if score == "unchanged" else f"{kind}, exact"
        axes.barh(
            places, values, height, xerr=bounds, color=_KIND_COLOURS[kind], label=label,
            error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of answers, with 95 % intervals")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=len(kinds), frameon=False)


def _draw_costs(axes: Axes, costs: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    """A bar for each method on a logarithmic scale, with its number."""
    some = [cost for cost in costs if cost[name]]
    values = [cost[name] for cost in some]
    axes.barh(range(len(some)), values, 0.6, color=_GREY)
    axes.set_yticks(range(len(some)), [cost["method"] for cost in some], fontsize=8)
    axes.invert_yaxis()
    if values:
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 10, max(values) * 300)  # room for numbers, and for whole powers of ten as ticks
        axes.tick_params(axis="x", which="minor", labelbottom=False)
    for place, value in enumerate(values):
        number = f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
        axes.text(value, place, f" {number}", va="center", fontsize=7)
    axes.set_xlabel(label, fontsize=8)


def plot_sequence(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `run_sequence` found: a line for each method over the edit batches, of exact answers to all questions
    so far with 95 % intervals, which ends in a cross where the method did not survive; and each method's matrix.

    Args:
        found: as `run_sequence` gives it.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    methods = found["methods"]
    n_lines = -(-len(methods) // _N_COLUMNS)
    figure = new_figure(13.0, max(4.6, 2.5 * n_lines))
    halves: Any = figure.subfigures(1, 2, width_ratios=(5, 7))
    left, right = halves
    _draw_lives(left.add_subplot(), found)
    if methods:
        cells = right.subplots(n_lines, _N_COLUMNS, squeeze=False).flat
        for axes, method in zip(cells, methods, strict=False):
            _draw_matrix(axes, method, found["batches"])
        for axes in cells[len(methods) :]:
            axes.set_axis_off()
        right.supxlabel("questions of edit batch", fontsize=8)
        right.supylabel("exact answers in % after edit batch", fontsize=8)
    figure.savefig(path)


def _draw_lives(axes: Axes, found: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(row["method"] for row in found["rows"]))
    width = 0.3 / max(1, len(names))
    for place, name in enumerate(names):
        rows = [row for row in found["rows"] if row["method"] == name]
        after = [row["after"] + width * (place - len(names) / 2) for row in rows]  # aside, so that intervals are seen
        em = [100 * row["em"] for row in rows]
        is_judged = rows[0]["survives"] is not None
        colour = _LINES[(place - 1) % len(_LINES)] if is_judged else _GREY
        spread = percent_spread(rows, "em")
        axes.errorbar(after, em, spread, color=colour, label=name, marker="o", markersize=4, capsize=2, linewidth=1.6)
        if is_judged and not rows[-1]["survives"]:
            axes.plot(after[-1], em[-1], marker="X", markersize=11, color=colour, markeredgecolor="#ffffff")
    axes.set_xticks(range(1, found["batches"] + 1))
    axes.set_xlabel(f"edit batches of {found['edits_per_batch']} that were taught; a cross: did not survive")
    axes.set_ylabel("exact answers to all questions so far in %, with 95 % intervals", fontsize=9)
    axes.set_ylim(bottom=-2)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _draw_matrix(axes: Axes, method: Mapping[str, Any], n_batches: int) -> None:
    """EM on each batch after each batch; what was not reached is empty."""
    import numpy as np

    cells = np.full((n_batches, n_batches), np.nan)
    for after, row in enumerate(method["matrix"]):
        for batch, value in enumerate(row):
            cells[after, batch] = np.nan if value is None else 100 * value
    axes.imshow(cells, cmap="cividis", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            colour = "#000000" if value > 55 else "#ffffff"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    places = range(n_batches)
    axes.set_xticks(places, [str(place + 1) for place in places], fontsize=7)
    axes.set_yticks(places, [str(place + 1) for place in places], fontsize=7)
    bwt = "" if method["bwt"] is None else f", BWT {100 * method['bwt']:+.1f}"
    axes.set_title(f"{method['method']}: {method['survived']} survived{bwt}", fontsize=8)
