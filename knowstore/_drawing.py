"""Empty figures of matplotlib (extra `plots`), which is imported when one is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from knowstore.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "matplotlib is not installed",
            kept="what was measured, without its picture",
            fix="pip install 'knowstore[plots]'",
        ) from error
    return Figure(figsize=(width, height), layout="constrained", dpi=120)
