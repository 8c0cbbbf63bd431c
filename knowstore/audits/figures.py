"""Heatmaps and curves of audits as SVG that stands in a page: its lines and letters have the colour of the text."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knowstore._drawing import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # becomes the colour of the text around
_COLOURS = ("#3f8fd2", "#d98a1f", "#35a37a", "#cf5f87", "#8f78d6")
_MAX_CELLS_WITH_NUMBERS = 12
_MAX_TICKS = 10
_STYLE: Any = {  # matplotlib types its names one by one
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
    "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def heatmap(rows: Sequence[Sequence[float | None]], after: Sequence[int], batches: Sequence[int], label: str) -> str:
    """The forgetting matrix (T, I) as SVG, in percent; cells without a score are left empty.

    Args:
        rows: scores from 0 to 1, None where nothing was asked.
        after: the T batches after which there was an audit.
        batches: the I batches whose probes were asked.
        label: what the scores are.
    """
    import matplotlib as mpl
    import numpy as np

    with mpl.rc_context(_STYLE | {"svg.hashsalt": label}):
        figure = new_figure(4.8, max(1.7, min(4.4, 1.2 + 0.35 * len(after))))
        axes = figure.add_subplot()
        percent = np.array([[np.nan if value is None else 100 * value for value in row] for row in rows], np.float64)
        mesh = axes.pcolormesh(percent, cmap="cividis", vmin=0, vmax=100, linewidth=0)
        for place, names in ((axes.xaxis, batches), (axes.yaxis, after)):
            step = -(-len(names) // _MAX_TICKS)
            place.set_ticks([n + 0.5 for n in range(0, len(names), step)], [str(name) for name in names[::step]])
        axes.invert_yaxis()
        axes.set_xlabel("probes of edit batch")
        axes.set_ylabel("after edit batch")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(mesh, ax=axes, label=f"{label}, %", pad=0.02)
        bar.outline.set_visible(False)
        if max(percent.shape) <= _MAX_CELLS_WITH_NUMBERS:
            for (row, column), value in np.ndenumerate(percent):
                if not np.isnan(value):
                    colour = "#000000" if value > 55 else "#ffffff"
                    axes.text(column + 0.5, row + 0.5, f"{value:.0f}", ha="center", va="center", color=colour)
        return _svg(figure, f"Heatmap: {label} of each batch's probes after each audited batch")


def curves(after: Sequence[int], series: Mapping[str, Sequence[float | None]], label: str) -> str:
    """Curves of fractions over audits as SVG, in percent; gaps where there is no value."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE | {"svg.hashsalt": label}):
        figure = new_figure(4.8, 3.0)
        axes = figure.add_subplot()
        places = range(len(after))
        for (name, values), colour in zip(series.items(), _COLOURS, strict=False):
            percent = [float("nan") if value is None else 100 * value for value in values]
            axes.plot(places, percent, label=name, color=colour, marker="o", markersize=3.5, linewidth=1.8)
        step = -(-len(after) // _MAX_TICKS)
        axes.set_xticks(list(places)[::step], [str(batch) for batch in after[::step]])
        axes.set_xlabel("after edit batch")
        axes.set_ylabel("%")
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color=_INK, alpha=0.15)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return _svg(figure, label)


def _svg(figure: Figure, label: str) -> str:
    """The figure without what only a file of its own needs, and without ids that another one has too."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()[out.getvalue().index("<svg") :].replace(_INK, "currentColor")
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
