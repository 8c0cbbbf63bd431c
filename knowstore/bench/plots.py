"""Pictures of measurements, by matplotlib (extra `plots`), which is imported when one is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowstore.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"none": "#9aa5b1", "static": "#c6a15b", "shuffled": "#b8646a", "gold": "#2f6f9f"}
_KIND_COLOURS = {
    "efficacy": "#2f6f9f",
    "paraphrase": "#6aa7cf",
    "unseen": "#c6a15b",
    "portability": "#8a6fb0",
    "neighbourhood": "#9aa5b1",
}
_SMOOTHED = 20  # steps
_MEASURED = {
    "gold": "nats with the passage's expert",
    "shuffled": "nats with another's",
    "held_out_accuracy": "first token right within its sentence",
    "sentence_accuracy": "sentence right",
    "gold_first": "passage first",
    "gold_em": "exact answers with the passage's expert",
    "shuffled_em": "exact answers with another's",
}


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def plot_controls(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_controls` found: a panel for each file, a bar of EM with its 95 % interval for each control.

    Args:
        rows: as `run_controls` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    files = list(dict.fromkeys(str(row["data"]) for row in rows))
    n = max(sum(row["data"] == name for row in rows) for name in files)
    figure = _figure(6.4 * len(files), 1.2 + 0.34 * n)
    for position, name in enumerate(files):
        axes = figure.add_subplot(1, len(files), position + 1)
        some = [row for row in rows if row["data"] == name]
        em = [100 * row["em"] for row in some]
        errors = [
            [max(0.0, 100 * (row["em"] - row["em_ci"][0])) for row in some],
            [max(0.0, 100 * (row["em_ci"][1] - row["em"])) for row in some],
        ]
        colours = [_COLOURS[row["control"]] for row in some]
        axes.barh(range(len(some)), em, xerr=errors, color=colours, error_kw={"elinewidth": 1, "ecolor": "#333333"})
        axes.set_yticks(range(len(some)), [f"{row['method']}: {row['control']}" for row in some])
        axes.invert_yaxis()
        axes.set_xlim(0, max(60.0, *(100 * row["em_ci"][1] for row in some)) + 12)
        for place, row in enumerate(some):
            axes.text(100 * row["em_ci"][1] + 1, place, f"{100 * row['em']:.1f}", va="center", fontsize=8)
        axes.set_xlabel("exact answers in %, with 95 % intervals")
        axes.set_title(f"{name}, {some[0]['n']} questions", fontsize=10)
    figure.savefig(path)


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
    figure = _figure(12.0, len(files) * (1.6 + 0.22 * n))
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
        bounds = [[100 * abs(row[f"{score}_ci"][side] - row[score]) for row in some] for side in (0, 1)]
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
    axes.barh(range(len(some)), values, 0.6, color=_COLOURS["none"])
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


def plot_training(log: Path, path: Path) -> None:
    """Draw the curves of a training log: the loss, smoothed, and what was measured on questions kept out.

    Args:
        log: the `log.jsonl` of a training run of either kind.
        path: where to; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    by_step: dict[int, dict[str, Any]] = {}  # a run that went on from a checkpoint has written some steps twice
    for line in log.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # half a line, where a run was killed
            continue
        by_step[row["step"]] = row
    rows = [by_step[step] for step in sorted(by_step)]
    figure = _figure(8.0, 6.0)
    losses, measured = figure.subplots(2, 1, sharex=True)
    minutes = [row["seconds"] / 60 for row in rows]
    for name in ("loss", "answer"):
        there = [(minute, row[name]) for minute, row in zip(minutes, rows, strict=True) if row.get(name) is not None]
        smooth = [
            sum(value for _, value in there[max(0, i - _SMOOTHED) : i + 1]) / len(there[max(0, i - _SMOOTHED) : i + 1])
            for i in range(len(there))
        ]
        if there:
            label = {"loss": "what a step minimises", "answer": "Eq. 5, nats per answer token"}[name]
            losses.plot([minute for minute, _ in there], smooth, label=label)
    losses.set_ylabel(f"loss, mean of {_SMOOTHED} steps")
    losses.legend()
    for name, label in _MEASURED.items():
        there = [(minute, row[name]) for minute, row in zip(minutes, rows, strict=True) if row.get(name) is not None]
        if there:
            measured.plot(*zip(*there, strict=True), marker="o", markersize=3, label=label)
    measured.set_xlabel("minutes")
    measured.set_ylabel("on questions kept out")
    if measured.get_lines():
        measured.legend()
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "matplotlib is not installed",
            kept="what was measured, without its picture",
            fix="pip install 'knowstore[plots]'",
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)
