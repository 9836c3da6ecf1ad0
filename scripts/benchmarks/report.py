"""What benchmarks leave behind: tables, figures to compare later releases with, and a plot."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from horcrux_nbd import __version__

from .common import Bar, Table

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
NOISE = 0.25  # a ratio that moved by less is not mentioned: machines are that noisy


def bars_table(tables: Mapping[str, Table]) -> Table:
    """Every bar of every benchmark, reached or not."""
    table = Table("Bars", ["what", "asked", "measured", ""])
    for bar in (bar for one in tables.values() for bar in one.bars):
        asked, measured = f"{bar.asked:.2f} ×", f"{bar.measured:.2f} ×"
        table.rows.append((bar.what, asked, measured, "reached" if bar.reached else "**missed**"))
    return table


def write(tables: Mapping[str, Table], command: str) -> list[Path]:
    """Keep the tables as this release's: markdown, JSON and a plot of the bars. What was measured
    before for the same release and is not in `tables` stays.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    data = FOLDER / f"{__version__}.json"
    kept: dict[str, Any] = json.loads(data.read_text()) if data.exists() else {}
    load = os.getloadavg()[0]
    for name, table in tables.items():
        kept[name] = {
            "taken": datetime.now(UTC).isoformat(timespec="minutes"),
            "machine": f"{os.cpu_count()} cores, {platform.release()}, load {load:.1f} at the end",
            "command": command,
            "title": table.title,
            "head": list(table.head),
            "rows": [list(row) for row in table.rows],
            "notes": table.notes,
            "bars": [vars(bar) for bar in table.bars],
            "figures": table.figures,
        }
    data.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    text = data.with_suffix(".md")
    text.write_text(_page(kept))
    plot = data.with_suffix(".svg")
    bars = [Bar(**bar) for one in kept.values() for bar in one["bars"]]
    return [data, text, *([plot] if draw(bars, plot) else [])]


def _page(kept: Mapping[str, Any]) -> str:
    tables = {
        name: Table(
            one["title"], one["head"], one["rows"], one["notes"], [Bar(**b) for b in one["bars"]]
        )
        for name, one in kept.items()
    }
    parts = [
        f"# Benchmarks of {__version__}\n",
        "Written by `scripts/bench --write`; two cores, shared with others: read the ratios.\n",
        f"![the bars]({__version__}.svg)\n",
        bars_table(tables).markdown(),
    ]
    for name, table in tables.items():
        one = kept[name]
        parts.append(table.markdown())
        parts.append(f"`{one['command']}`, {one['taken']}, {one['machine']}.\n")
    return "\n".join(parts)


def draw(bars: Sequence[Bar], target: Path) -> bool:
    """Draw how far each bar was reached; False where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    # Else each run's file differs in its ids and dates.
    matplotlib.rcParams["svg.hashsalt"] = "horcrux"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(bars) + 1.2))
    parts = [bar.measured / bar.asked for bar in bars]
    colours = ["#2a7f62" if bar.reached else "#c8553d" for bar in bars]
    axes.barh([bar.what for bar in bars], parts, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    for number, bar in enumerate(bars):
        text = f" {bar.measured:.2f} of {bar.asked:.2f}"
        axes.text(min(parts[number], 3.0), number, text, va="center", fontsize=8)
    axes.set_xlim(0, 3.6)
    axes.invert_yaxis()
    axes.set_xlabel("measured / asked for")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})
    return True


def compare(tables: Mapping[str, Table]) -> list[str]:
    """One line for each ratio that moved by more than noise since the release before this one."""
    older = sorted(FOLDER.glob("*.json"), key=lambda path: path.stat().st_mtime)
    older = [path for path in older if path.stem != __version__] or older
    if not older:
        return []
    before = json.loads(older[-1].read_text())
    lines = []
    for name, table in tables.items():
        was = {bar["what"]: bar["measured"] for bar in before.get(name, {}).get("bars", ())}
        for bar in table.bars:
            old = was.get(bar.what)
            if old and abs(bar.measured / old - 1) > NOISE:
                word = "slower" if bar.measured < old else "faster"
                lines.append(
                    f"{bar.what}: {bar.measured:.2f} ×, {word} than {old:.2f} × in {older[-1].stem}"
                )
    return lines
