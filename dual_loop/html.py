"""Pages that stand alone: one HTML file, no network, light and dark, readable on a phone.

Everything that comes from data is escaped here; callers hand over plain text and pictures.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--card:#fff;--text:#1d1d1f;--soft:#62626a;--line:#e3e1dc;--accent:#b45309;
--good:#15803d;--bad:#b91c1c;--c0:#b45309;--c1:#1d4ed8;--c2:#15803d;--c3:#9333ea;--c4:#be185d;--c5:#0f766e}
@media (prefers-color-scheme:dark){:root{--bg:#161618;--card:#1f1f23;--text:#ececf0;--soft:#a0a0aa;--line:#34343a;
--accent:#f59e0b;--good:#4ade80;--bad:#f87171;--c0:#f59e0b;--c1:#60a5fa;--c2:#4ade80;--c3:#c084fc;--c4:#f472b6;
--c5:#2dd4bf}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:16px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.2rem;margin:2em 0 .6em;border-bottom:1px solid var(--line);
padding-bottom:.3em}h3{font-size:1rem;margin:1.2em 0 .4em}
p,li{max-width:72ch}.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.85rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:14px}
.wide{grid-template-columns:repeat(auto-fill,minmax(min(100%,480px),1fr))}.grid+.grid{margin-top:14px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px}
figure img{width:100%;height:auto;border-radius:6px;display:block}
figure .pair{display:grid;gap:6px}
figcaption{font-size:.88rem;margin-top:8px;overflow-wrap:anywhere}
svg{width:100%;height:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}.key{display:inline-block;margin-right:14px;font-size:.85rem}
.key i{display:inline-block;width:12px;height:3px;margin-right:5px;vertical-align:middle}
code{background:var(--card);border:1px solid var(--line);border-radius:4px;padding:0 4px;overflow-wrap:anywhere}
"""

CHART_WIDTH, CHART_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 520, 240, 54, 12, 14, 28
NUM_COLOURS = 6
TICKS = 4


@dataclass
class Page:
    """Collects parts of one page.

    Attributes:
        title: of the page and of its first heading.
        lead: one line below it.
        parts: ready HTML; the methods below add to it.
    """

    title: str
    lead: str = ""
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str, note: str = "") -> None:
        """Start a section, with a line that says what is seen."""
        self.parts.append(f"<h2>{html.escape(text)}</h2>")
        if note:
            self.text(note)

    def subheading(self, text: str) -> None:
        self.parts.append(f"<h3>{html.escape(text)}</h3>")

    def text(self, text: str, kind: str = "soft") -> None:
        """Add a paragraph of plain text; ``kind`` is ``soft``, ``good``, ``bad`` or empty."""
        self.parts.append(f'<p class="{kind}">{html.escape(text)}</p>')

    def tiles(self, values: Mapping[str, str]) -> None:
        """Add a row of large figures: name to value."""
        cells = (
            f'<div class="tile"><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>' for k, v in values.items()
        )
        self.parts.append(f'<div class="tiles">{"".join(cells)}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; cells are escaped."""
        top = "".join(f"<th>{html.escape(name)}</th>" for name in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        self.parts.append(f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>')

    def gallery(self, items: Sequence[Figure], is_wide: bool = False) -> None:
        """Add pictures with captions, as many beside each other as fit; two of wide ones."""
        kind = "grid wide" if is_wide else "grid"
        self.parts.append(f'<div class="{kind}">{"".join(item.html() for item in items)}</div>')

    def charts(self, charts: Sequence[str]) -> None:
        """Add charts (:func:`line_chart`), as many beside each other as fit."""
        self.parts.append(f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>')

    def html(self) -> str:
        """Return the whole file."""
        title = html.escape(self.title)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}</style></head><body><main><h1>{title}</h1>"
            f'<p class="soft">{html.escape(self.lead)}</p>{"".join(self.parts)}</main></body></html>\n'
        )


@dataclass(frozen=True)
class Figure:
    """Pictures (``data:`` addresses) side by side, with lines of text below; the first line stands out."""

    pictures: Sequence[str]
    lines: Sequence[str]
    alt: str = ""

    def html(self) -> str:
        alt = html.escape(self.alt or (self.lines[0] if self.lines else ""), quote=True)
        images = "".join(f'<img src="{uri}" alt="{alt}" loading="lazy">' for uri in self.pictures)
        columns = f"grid-template-columns:repeat({len(self.pictures)},1fr)"
        kind = f' class="pair" style="{columns}"' if len(self.pictures) > 1 else ""
        first, *others = [html.escape(line) for line in self.lines] or [""]
        rest = "".join(f'<br><span class="soft">{line}</span>' for line in others)
        return f"<figure><div{kind}>{images}</div><figcaption>{first}{rest}</figcaption></figure>"


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return one chart as HTML: named lines of (x, y) points; points that are not finite are left out.

    The same colours in light and dark come from the page's style. Every line's last value is in the legend.
    """
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_low, x_high, y_low, y_high = *_span(xs), *_span(ys)

    def place(point: tuple[float, float]) -> str:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (CHART_WIDTH - LEFT - RIGHT)
        y = TOP + (y_high - point[1]) / (y_high - y_low) * (CHART_HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    grid = []
    for tick in range(TICKS + 1):
        value = y_low + (y_high - y_low) * tick / TICKS
        y = float(place((x_low, value)).split(",")[1])
        grid.append(f'<line x1="{LEFT}" x2="{CHART_WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        grid.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_short(value)}</text>')
    for value, anchor in ((x_low, "start"), (x_high, "end")):
        x = place((value, y_low)).split(",")[0]
        grid.append(f'<text x="{x}" y="{CHART_HEIGHT - 8}" text-anchor="{anchor}">{_short(value)}</text>')
    drawn, keys = [], []
    for number, (name, points) in enumerate(lines.items()):
        colour = f"var(--c{number % NUM_COLOURS})"
        path = " ".join(place(point) for point in points)
        dot = place(points[-1]).split(",")
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        drawn.append(f'<circle cx="{dot[0]}" cy="{dot[1]}" r="3" fill="{colour}"/>')
        keys.append(
            f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)} {_short(points[-1][1])}</span>'
        )
    label = html.escape(f"{title}: {', '.join(lines)}", quote=True)
    return (
        f"<h3>{html.escape(title)}</h3>"
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{label}">{"".join(grid + drawn)}</svg>'
        f"<div>{''.join(keys)}</div>"
    )


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.04 or abs(low) * 0.1 or 1.0
    return low - (pad if low == high else 0.0), high + (pad if low == high else 0.0)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
