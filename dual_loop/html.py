"""Pages that stand alone: one HTML file, no network, light and dark, readable on a phone.

``assets/page.html`` draws them and escapes everything; callers hand over plain text and pictures.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image

ASSETS = Path(__file__).resolve().parent / "assets"
LINE_COLOURS = ("#d97706", "#3b82f6", "#16a34a", "#a855f7", "#ec4899", "#0d9488")
"""They show on white and on black, as the grey of the axes does."""
AXES_COLOUR = "#888888"


@dataclass(frozen=True)
class Figure:
    """Pictures side by side, with lines of text below; the first line stands out."""

    pictures: Sequence[Image.Image]
    lines: Sequence[str]


@dataclass
class Page:
    """Collects parts of one page.

    Attributes:
        title: of the page and of its first heading.
        lead: one line below it.
        parts: what the methods below added: the kind of each, and what the template needs to draw it.
    """

    title: str
    lead: str = ""
    parts: list[Mapping[str, object]] = field(default_factory=list)

    def heading(self, text: str, note: str = "") -> None:
        """Start a section, with a line that says what is seen."""
        self.parts.append({"kind": "heading", "text": text})
        if note:
            self.text(note)

    def text(self, text: str, tone: str = "soft") -> None:
        """Add a paragraph; ``tone`` is ``soft``, ``good`` or ``bad``."""
        self.parts.append({"kind": "text", "text": text, "tone": tone})

    def tiles(self, tiles: Mapping[str, str]) -> None:
        """Add a row of large figures: name to value."""
        self.parts.append({"kind": "tiles", "tiles": tiles})

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]], folded: str = "") -> None:
        """Add a table; one that is ``folded`` shows this line until it is opened."""
        self.parts.append({"kind": "table", "head": head, "rows": rows, "folded": folded})

    def gallery(self, figures: Sequence[Figure], is_wide: bool = False) -> None:
        """Add pictures with captions, as many beside each other as fit; two of wide ones."""
        self.parts.append({"kind": "gallery", "figures": figures, "is_wide": is_wide})

    def charts(self, charts: Sequence[str]) -> None:
        """Add charts (:func:`line_chart`), as many beside each other as fit."""
        self.parts.append({"kind": "charts", "charts": charts})

    def html(self) -> str:
        """Return the whole file."""
        loader = jinja2.FileSystemLoader(ASSETS)
        templates = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        templates.filters["data_uri"] = data_uri
        return templates.get_template("page.html").render(title=self.title, lead=self.lead, parts=self.parts)


def data_uri(picture: Image.Image) -> str:
    """Return a picture as a ``data:`` address with a JPEG inside."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def line_chart(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return a chart as SVG: named lines of (x, y) points; empty where no point is finite, for only these are drawn.

    Every line's last value is in the legend. The page's style colours the text, in light and dark.
    """
    # Here, because few pages have charts.
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Drawing
    from matplotlib.ticker import MaxNLocator

    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        drawing = Drawing(figsize=(4.2, 2.7), layout="constrained")
        axes = drawing.add_subplot()
        axes.set_prop_cycle(color=LINE_COLOURS)
        for points in lines.values():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, markevery=[-1])
        axes.tick_params(color=AXES_COLOUR, grid_color=AXES_COLOUR, grid_alpha=0.3)
        axes.spines[:].set_color(AXES_COLOUR)
        axes.grid()
        axes.set_title(title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        last = [f"{name.rpartition('/')[2]} {points[-1][1]:.4g}" for name, points in lines.items()]
        drawing.legend(axes.lines, last, frameon=False, loc="outside lower center", ncols=2, fontsize="small")
        stream = io.StringIO()
        # Neither time nor version goes into the file; the title is read out in place of the picture.
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        label = f"{title}: {', '.join(lines)}"
        drawing.savefig(stream, format="svg", transparent=True, metadata={**unsaid, "Title": label})
    text = stream.getvalue()
    return text[text.index("<svg") :]
