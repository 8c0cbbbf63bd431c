"""Pictures of measurements, by matplotlib (extra `plots`), which is imported when one is drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knowstore._drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"none": "#9aa5b1", "static": "#c6a15b", "shuffled": "#b8646a", "gold": "#2f6f9f"}
_SHARES = ("#2f6f9f", "#4f86b0", "#7d8b99")
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


def plot_controls(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_controls` found: a panel for each file, a bar of EM with its 95 % interval for each control.

    Args:
        rows: as `run_controls` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, panels = _bar_panels(rows, 6.4)
    for axes, name, some in panels:
        labels = [f"{row['method']}: {row['control']}" for row in some]
        _draw_bars(axes, some, labels, [_COLOURS[row["control"]] for row in some])
        axes.set_xlim(0, max(60.0, *(100 * row["em_ci"][1] for row in some)) + 12)
        axes.set_title(f"{name}, {some[0]['n']} questions", fontsize=10)
    figure.savefig(path)


def _bar_panels(
    rows: Sequence[Mapping[str, Any]], width: float
) -> tuple[Figure, list[tuple[Axes, str, list[Mapping[str, Any]]]]]:
    """A figure with a panel of `width` inches for each file, beside each other, with its name and its rows."""
    by_file: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_file.setdefault(str(row["data"]), []).append(row)
    figure = new_figure(width * len(by_file), 1.2 + 0.34 * max(map(len, by_file.values())))
    axes = figure.subplots(1, len(by_file), squeeze=False)[0]
    return figure, [(one, name, some) for one, (name, some) in zip(axes, by_file.items(), strict=True)]


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], labels: Sequence[str], colours: Sequence[str]) -> None:
    """A bar of EM with its interval and its number for each row, the first on top."""
    em = [100 * row["em"] for row in rows]
    errors = percent_spread(rows, "em")
    axes.barh(range(len(rows)), em, xerr=errors, color=colours, error_kw={"elinewidth": 1, "ecolor": "#333333"})
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    for place, row in enumerate(rows):
        axes.text(100 * row["em_ci"][1] + 1, place, f"{100 * row['em']:.1f}", va="center", fontsize=8)
    axes.set_xlabel("exact answers in %, with 95 % intervals")


def plot_answers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_answers` found: EM with its 95 % interval over the number of passages, a line for each mode.

    Args:
        rows: as `run_answers` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(8.0, 4.4)
    axes = figure.add_subplot()
    methods = list(dict.fromkeys(str(row["method"]) for row in rows))
    colours: dict[str, str] = {}
    for place, method in enumerate(methods):
        some = [row for row in rows if row["method"] == method]
        em = [100 * row["em"] for row in some]
        if some[0]["k"] == 0:
            axes.axhline(em[0], linestyle=":", color=_COLOURS["none" if method == "base" else "static"], label=method)
            continue
        mode = method.removesuffix(", as served")
        colour = colours.setdefault(mode, f"C{len(colours)}")
        beside = [row["k"] + 0.06 * (place - len(methods) / 2) for row in some]  # so that intervals do not hide others
        axes.errorbar(
            beside, em, yerr=percent_spread(some, "em"), capsize=2, elinewidth=1, color=colour, label=method,
            marker="o" if method == mode else "D", markerfacecolor=colour if method == mode else "white",
        )  # fmt: skip
    axes.set_xlabel("passages mounted or read")
    axes.set_ylabel("exact answers in %, with 95 % intervals")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper")
    figure.savefig(path)


def plot_layers(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_layers` found: gold minus shuffled over the layer, with 95 % intervals, a panel for each file.

    Args:
        rows: as `run_layers` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    files = list(dict.fromkeys(str(row["data"]) for row in rows))
    figure = new_figure(6.4 * len(files), 4.4)
    for axes, name in zip(figure.subplots(1, len(files), squeeze=False)[0], files, strict=True):
        some = sorted((row for row in rows if row["data"] == name), key=lambda row: row["layer"])
        for score, colour in (("f1", _COLOURS["none"]), ("em", _COLOURS["gold"])):
            gains = [100 * row[f"{score}_gain"] for row in some]
            spread = percent_spread(some, f"{score}_gain")
            layers = [row["layer"] for row in some]
            axes.errorbar(layers, gains, yerr=spread, marker="o", capsize=3, color=colour, label=score.upper())
        axes.axhline(0.0, linestyle=":", color=_COLOURS["none"])
        axes.set_xlabel("0-based layer of the experts")
        axes.set_ylabel("right passage's minus another's, in %")
        steps = " to ".join(f"{n:,}" for n in sorted({f([row["steps"] for row in some]) for f in (min, max)}))
        axes.set_title(f"{name}, {some[0]['n']} questions, {steps} steps", fontsize=10)
        axes.legend()
    figure.savefig(path)


def plot_ablation(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_ablation` found: a panel for each file, a bar of EM with the right passage's expert for each
    variant, with its 95 % interval.

    Args:
        rows: as `run_ablation` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    bars = [row | {"em": row["gold_em"], "em_ci": row["gold_em_ci"]} for row in map(dict, rows)]
    figure, panels = _bar_panels(bars, 6.4)
    for axes, name, some in panels:
        labels = [f"{row['variant']}, {row['steps']:,} steps" if row["steps"] else row["variant"] for row in some]
        _draw_bars(axes, some, labels, [_COLOURS["gold"]] + [_COLOURS["none"]] * (len(some) - 1))
        axes.set_xlim(0, max(60.0, *(100 * row["em_ci"][1] for row in some)) + 12)
        axes.set_title(f"{name}, {some[0]['n']} questions", fontsize=10)
    figure.savefig(path)


def plot_ceiling(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_ceiling` found: a panel for each file, a bar of EM with its 95 % interval for each kind of expert.

    Args:
        rows: as `run_ceiling` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure, panels = _bar_panels(rows, 7.4)
    names = {"generated": "the hypernetwork", "nothing": "nothing", "relu": "ReLU", "softmax": "softmax"}
    colours = {None: _COLOURS["gold"], "other questions": _COLOURS["shuffled"], "all questions": _COLOURS["static"]}
    for axes, name, some in panels:
        labels = [
            f"from {names[row['start']]}, {names[row['activation']]}, "
            f"{'layers' if len(row['layers']) > 1 else 'layer'} {', '.join(map(str, row['layers']))}: "
            f"{'not taught' if row['taught'] is None else row['taught']}"
            for row in some
        ]  # fmt: skip
        _draw_bars(axes, some, labels, [colours[row["taught"]] for row in some])
        axes.set_xlim(0, 115)
        axes.set_title(f"{name}\none question of each of {some[0]['n']} passages", fontsize=10)
    figure.savefig(path)


def plot_rerank(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what `run_rerank` found: how often the gold passage is first, among the first four and found at all.

    Args:
        rows: as `run_rerank` gives them.
        path: where to; the suffix says the format, PNG, SVG or PDF.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(6.4, 1.4 + 0.6 * len(rows))
    axes = figure.add_subplot()
    shown = {"top1": "first", "top4": "among the first four", "found": "found"}
    for position, (name, label) in enumerate(shown.items()):
        values = [100 * row[name] for row in rows]
        places = [place + 0.26 * (position - 1) for place in range(len(rows))]
        errors = percent_spread(rows, name) if name == "top1" else None
        axes.barh(places, values, 0.24, xerr=errors, color=_SHARES[position], label=label)
        for place, value in zip(places, values, strict=True):
            axes.text(1, place, f"{value:.1f}", va="center", fontsize=7, color="#ffffff")
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("gold passages in % of questions, with 95 % intervals")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


def plot_speed(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `run_speed` found: seconds to the first token and to the end of an answer by number of passages, with
    quartiles, and every ratio with its 95 % interval.

    Args:
        found: as `run_speed` gives it.
        path: where to; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(13.0, 1.6 + 0.2 * max(16, len(found["ratios"])))
    first, total, ratios = figure.subplots(1, 3, width_ratios=(3, 3, 4))
    bare = next(row for row in found["answers"] if row["method"] == "bare")
    for axes, name, title in ((first, "first_token_s", "to the first token"), (total, "total_s", "to the end")):
        _draw_seconds(axes, found["answers"], name)
        axes.axhline(bare[name], color=_COLOURS["none"], linestyle="--", label="bare model")
        axes.set_title(title, fontsize=10)
        axes.legend()
    _draw_ratios(ratios, found["ratios"])
    figure.savefig(path)


def _draw_seconds(axes: Axes, answers: Sequence[Mapping[str, Any]], name: str) -> None:
    for method, colour in (("rag", "shuffled"), ("hybrid", "static"), ("experts", "gold")):
        rows = [row for row in answers if row["method"] == method]
        seconds = [row[name] for row in rows]
        spread = _spread(seconds, [row[f"{name}_quartiles"] for row in rows])
        places = [row["k"] for row in rows]
        axes.errorbar(places, seconds, spread, color=_COLOURS[colour], marker="o", capsize=2, label=method)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("passages")
    axes.set_ylabel("seconds from the chosen passages on")


def _draw_ratios(axes: Axes, ratios: Sequence[Mapping[str, Any]]) -> None:
    values = [row["ratio"] for row in ratios]
    spread = _spread(values, [(row["low"], row["high"]) for row in ratios])
    axes.errorbar(values, range(len(values)), xerr=spread, fmt="o", capsize=2, color=_COLOURS["gold"])
    axes.set_yticks(range(len(values)), [row["name"] for row in ratios], fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color=_COLOURS["none"], linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("times as long, with 95 % intervals")


def _spread(values: Sequence[float], limits: Sequence[tuple[float, float]]) -> list[list[float]]:
    """How far limits are below and above values, as error bars are given."""
    return [
        [max(0.0, value - low) for value, (low, _) in zip(values, limits, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, limits, strict=True)],
    ]


def percent_spread(rows: Sequence[Mapping[str, Any]], score: str) -> list[list[float]]:
    """How far the interval of a score is below and above it, in percent."""
    limits = [(100 * row[f"{score}_ci"][0], 100 * row[f"{score}_ci"][1]) for row in rows]
    return _spread([100 * row[score] for row in rows], limits)


def plot_peers(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `run_peers` found: exact answers and answers that hold an accepted one with 95 % intervals, seconds of
    a question with quartiles, the peak of memory, and passages that are taken in a second.

    Args:
        found: as `run_peers` gives it.
        path: where to; the suffix says the format.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    rows, ingest = found["rows"], found["ingest"]
    names = [f"{row['method']}, own prompt" if row["prompt"] == "own" else row["method"] for row in rows]
    figure = new_figure(14.0, 1.6 + 0.4 * len(rows))
    scores, seconds, memory, rates = figure.subplots(1, 4, width_ratios=(4, 3, 3, 3))
    for place, (score, label) in enumerate((("em", "exact"), ("holds", "holds the answer"))):
        places = [row + 0.4 * place - 0.2 for row in range(len(rows))]
        scores.barh(
            places, [100 * row[score] for row in rows], 0.4, xerr=percent_spread(rows, score), label=label,
            color=_COLOURS[("gold", "none")[place]], error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
        )  # fmt: skip
    scores.set_xlabel("% of answers, with 95 % intervals")
    scores.legend(fontsize=8)
    taken = [row["answer_s"] for row in rows]
    spread = _spread(taken, [row["answer_s_quartiles"] for row in rows])
    seconds.barh(range(len(rows)), taken, 0.6, xerr=spread, color=_COLOURS["shuffled"])
    seconds.set_xlabel("seconds for an answer, with quartiles")
    memory.barh(range(len(rows)), [(row["peak_bytes"] or 0) / 1e9 for row in rows], 0.6, color=_COLOURS["static"])
    memory.set_xlabel("most memory while answering, GB")
    rates.barh(range(len(ingest)), [row["passages_per_s"] for row in ingest], 0.6, color=_COLOURS["static"])
    rates.set_xlabel("passages taken in a second")
    for axes, labels in ((scores, names), (seconds, None), (memory, None), (rates, [row["method"] for row in ingest])):
        axes.set_yticks(range(len(ingest if axes is rates else rows)), labels or [""] * len(rows), fontsize=8)
        axes.invert_yaxis()
    figure.savefig(path)


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
    figure = new_figure(8.0, 6.0)
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
