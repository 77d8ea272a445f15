"""The two plots of a result, as SVG and PNG. Needs matplotlib, which the package itself does without."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quicferry.bench.figures import Result, Variant
from quicferry.protocol.errors import FerryError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS: Final = {
    "ferry": "#0b6e99",
    "copied": "#52a8c9",
    "source-order": "#c0392b",
    "reconnect": "#b9770e",
    "podman": "#7d3c98",
    "floor": "#7f8c8d",
}
OTHER: Final = "#2c3e50"
FORMATS: Final = ("svg", "png")


def check(folder: Path) -> None:
    """Whether plots can be drawn and written there; makes the folder.

    Raises FerryError ``machine_unfit`` without matplotlib, ``file_refused`` if they can't be written.
    """
    if importlib.util.find_spec("matplotlib") is None:  # not loaded: before a measurement it would only weigh on it
        raise FerryError(
            "machine_unfit", "The plots need matplotlib.", hint="make setup installs it; or pip install matplotlib."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refused(folder, error) from None


def draw(result: Result, folder: Path) -> list[Path]:
    """Write ``gaps`` and ``rtt`` in both formats into ``folder``; their paths. Raises as :func:`check`."""
    check(folder)
    import matplotlib

    matplotlib.use("Agg")
    # The same result gives the same file, so that a commit shows only what has changed.
    matplotlib.rcParams.update({"svg.hashsalt": "quicferry", "svg.fonttype": "none", "font.size": 9})
    figures = {"gaps": _gaps(result.variants), "rtt": _rtt(result.variants)}
    written = []
    try:
        for name, figure in figures.items():
            for kind in FORMATS:
                path = folder / f"{name}.{kind}"
                figure.savefig(path, dpi=144, metadata={"Date": None} if kind == "svg" else {"Software": None})
                written.append(path)
    except OSError as error:
        raise _refused(folder, error) from None
    return written


def _refused(folder: Path, error: OSError) -> FerryError:
    return FerryError(
        "file_refused",
        f"The plots can't be written to {folder}: {error.strerror or error}.",
        hint="Name a folder that you may write.",
    )


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(8, height), layout="constrained")


def _gaps(variants: Mapping[str, Variant]) -> Figure:
    """Every move's gap as a point, the median as a line; milliseconds, logarithmic."""
    shown = [(name, one) for name, one in variants.items() if one.samples_gap_ms]
    figure = _figure(0.9 + 0.62 * max(1, len(shown)))
    axes: Any = figure.subplots()
    for row, (name, one) in enumerate(shown):
        colour, count = COLOURS.get(name, OTHER), len(one.samples_gap_ms)
        spread = [row + 0.22 * (2 * number / max(1, count - 1) - 1) for number in range(count)]
        axes.scatter(one.samples_gap_ms, spread, s=14, color=colour, alpha=0.75, linewidths=0)
        if one.gap_ms is not None:
            axes.plot([one.gap_ms.median] * 2, [row - 0.36, row + 0.36], color=colour, linewidth=2)
            axes.annotate(
                f"{one.gap_ms.median:,.0f} ms",
                (max(one.samples_gap_ms), row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.set_xlabel("gap, ms (log): the client's last good echo before to its first after; line: median")
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", which="both", alpha=0.25)
    axes.set_title("The pause of one move, every move a point (floor: CRIU's own time, no client)")
    return figure


def _rtt(variants: Mapping[str, Variant]) -> Figure:
    """Round trips by when the ping was sent, across the move nearest to the median; one row a variant."""
    shown = [(name, one) for name, one in variants.items() if one.trace is not None and one.trace.points]
    figure = _figure(0.8 + 1.7 * max(1, len(shown)))
    rows: Any = figure.subplots(max(1, len(shown)), 1, squeeze=False)
    for (name, one), axes in zip(shown, rows[:, 0], strict=False):
        assert one.trace is not None  # noqa: S101 - filtered above
        axes.axvspan(0, one.trace.gap_ms, color="#000000", alpha=0.07, linewidth=0)
        axes.plot(*zip(*one.trace.points, strict=True), ".", color=COLOURS.get(name, OTHER), markersize=3)
        axes.set_ylabel("RTT, ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.set_title(f"{name}: gap {one.trace.gap_ms:,.0f} ms", loc="left")
    rows[-1, 0].set_xlabel("when the ping was sent, ms after the last good echo before the gap (shaded)")
    return figure
