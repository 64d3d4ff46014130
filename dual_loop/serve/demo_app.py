"""The loop in a browser: draw or upload masks, read their captions, edit them, watch the masks that come back.

Needs the extra ``demo`` (gradio). The server listens on 127.0.0.1 unless told otherwise, and nothing is loaded from
elsewhere: fonts and scripts are gradio's own.
"""

from __future__ import annotations

import atexit
import html
import importlib
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypedDict
from urllib.parse import urlsplit

import numpy as np

from dual_loop.data.masks_dir import read_mask_file
from dual_loop.drawing import GIVEN_COLOUR, PREDICTED_COLOUR, overlay
from dual_loop.errors import DualLoopError, EnvironmentProblem, SampleError, explain
from dual_loop.metrics import iou, mask_overlap
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

SIDE = 440
SAME_IMAGE = 4.0
"""Mean difference of two images, in 0..255, below which they are the same picture encoded twice."""
MAX_REGIONS = 8
MAX_UPLOAD = "20mb"
MAX_QUEUE = 32
MAX_SESSIONS = 200
"""Visitors whose regions are kept; the oldest go."""
KEEP_SECONDS = 600
"""Uploaded and drawn files are removed that long after they came; mask files as soon as they are read."""
EXAMPLE_SEEDS = (1003, 1002, 1011)
START_TEXT = "Open an image, draw over an object with the brush, and press **Caption what I drew**."
CSS = """
.gradio-container{max-width:1180px!important;margin:auto!important}
#matrix table{border-collapse:collapse;font-variant-numeric:tabular-nums}
#matrix th,#matrix td{padding:6px 12px;text-align:center;border:1px solid var(--border-color-primary)}
#matrix th{font-weight:600}#matrix td.own{outline:2px solid var(--color-accent);outline-offset:-2px}
#iou p{font-size:1.5rem;font-weight:700;font-variant-numeric:tabular-nums;margin:0}
"""


class EditorValue(TypedDict):
    """What gradio's image editor gives: the image (H, W, 3 or 4) uint8, and layers (H, W, 4) of brush strokes."""

    background: np.ndarray | None
    layers: list[np.ndarray]


@dataclass(frozen=True)
class Region:
    """A region: its mask (H, W) bool, its caption, as written or as edited, and the mask (H, W) that came back."""

    name: str
    mask: np.ndarray
    caption: str
    back: np.ndarray


@dataclass(frozen=True)
class Session:
    """What one visitor has drawn, and what the model made of it."""

    image: np.ndarray | None = None  # (H, W, 3) uint8, None before the first region
    regions: tuple[Region, ...] = ()
    drawn: np.ndarray | None = None  # (H, W) bool, all brush strokes that became regions; they stay on the canvas

    def matrix(self) -> np.ndarray:
        """Return the IoU (N, N) of every mask that came back with every given mask."""
        if not self.regions:
            return np.zeros((0, 0))
        given = np.stack([region.mask for region in self.regions])
        return np.stack([iou(*mask_overlap(np.broadcast_to(one.back, given.shape), given)) for one in self.regions])

    def find(self, name: str | None) -> int:
        """Return the place of the region called ``name``, -1 where there is none."""
        return next((place for place, region in enumerate(self.regions) if region.name == name), -1)


@dataclass(frozen=True)
class DemoLogic:
    """What the page does, without the page: every method takes a session and returns a new one."""

    predictor: Predictor

    def add_regions(
        self, session: Session, image: np.ndarray | None, regions: Sequence[tuple[str, np.ndarray]]
    ) -> Session:
        """Caption new regions and segment their captions; another image starts anew.

        Raises:
            SampleError: no image, no region, too many, or a mask that does not fit.
        """
        if image is None:
            raise SampleError("not_an_image", explain("no image is open", fix="open one, or choose an example"))
        if not regions:
            fix = "draw over an object with the brush, or upload a mask"
            raise SampleError("empty_mask", explain("no region is marked", fix=fix))
        old = session if _is_same(session.image, image) else Session()
        image = image if old.image is None else old.image
        if len(old.regions) + len(regions) > MAX_REGIONS:
            seen, expected = len(old.regions) + len(regions), f"at most {MAX_REGIONS}"
            raise SampleError("too_many", explain("too many regions", seen=seen, expected=expected, fix="start over"))
        for name, mask in regions:
            if mask.shape != image.shape[:2]:
                fix = "draw the mask on this very image"
                message = explain("a mask and the image differ in size", name, mask.shape, image.shape[:2], fix)
                raise SampleError("size_mismatch", message)
        result = self.predictor.loop(image, np.stack([mask for _, mask in regions]))
        new, first = [], len(old.regions) + 1
        for number, (name, mask) in enumerate(regions):
            # Numbered, so that two files of one name stay apart.
            label = f"{first + number}: {name}" if name else f"region {first + number}"
            new.append(Region(label, mask, result.captions[number], result.masks[number]))
        return Session(image, (*old.regions, *new), old.drawn)

    def add_drawing(self, session: Session, image: np.ndarray | None, drawn: np.ndarray | None) -> Session:
        """Make a region of what was drawn since the last one.

        Where strokes were wiped since then, everything on the canvas is the new region: so a whole can be drawn after
        its part.

        Raises:
            SampleError: as :meth:`add_regions`.
        """
        regions = []
        if image is not None and drawn is not None:
            old = session.drawn if _is_same(session.image, image) else None
            is_kept = old is not None and old.shape == drawn.shape and bool(drawn[old].all())
            new = drawn & ~old if old is not None and is_kept else drawn
            regions = [("", new)] if new.any() else []
        return replace(self.add_regions(session, image, regions), drawn=drawn)

    def edit(self, session: Session, place: int, caption: str) -> Session:
        """Segment another caption of a region.

        Raises:
            SampleError: there is no such region. PromptError: the caption holds a special token.
        """
        if session.image is None or not 0 <= place < len(session.regions):
            raise SampleError("no_region_left", explain("no region is chosen", fix="mark a region first"))
        back = np.zeros(session.image.shape[:2], bool)
        if text := caption.strip():
            back = self.predictor.segment(session.image, text)[0].mask
        regions = list(session.regions)
        regions[place] = replace(regions[place], caption=caption, back=back)
        return replace(session, regions=tuple(regions))


def _is_same(first: np.ndarray | None, second: np.ndarray) -> bool:
    """Tell whether two images are one, up to what an encoder changes."""
    if first is None or first.shape != second.shape:
        return False
    return float(np.abs(first.astype(np.int16) - second.astype(np.int16)).mean()) < SAME_IMAGE


def read_uploads(paths: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Return the regions of uploaded mask files; messages name the files as the visitor knows them.

    Raises:
        SampleError: a file is no mask.
    """
    regions: list[tuple[str, np.ndarray]] = []
    for path in map(Path, paths):
        try:
            regions += read_mask_file(path)
        except SampleError as error:
            seen, expected = error.reason.replace("_", " "), "a PNG mask: 0 and 255, or labels"
            message = explain("an uploaded file cannot be used", path.name, seen, expected, "upload another file")
            raise SampleError(error.reason, message) from error
    return regions


def read_drawing(value: EditorValue | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return (image, mask) of an image editor's value: RGB pixels, and where anything was drawn; None where neither."""
    if not value or value["background"] is None:
        return None, None
    image = np.ascontiguousarray(value["background"][:, :, :3])
    drawn = np.zeros(image.shape[:2], bool)
    for layer in value["layers"]:
        drawn |= layer[:, :, 3] > 0
    return image, drawn if drawn.any() else None


def matrix_html(session: Session) -> str:
    """Return the IoU of every caption's mask with every region as a table; the own region is outlined."""
    if not session.regions:
        return ""
    table = "".join(f"<th>{html.escape(region.name)}</th>" for region in session.regions)
    for place, values in enumerate(session.matrix()):
        table += f"</tr><tr><th>“{html.escape(session.regions[place].caption)}”</th>"
        for column, value in enumerate(values):
            own = ' class="own"' if column == place else ""
            table += f'<td{own} style="background:rgba(0,150,220,{0.65 * value:.2f})">{value:.2f}</td>'
    return f"<table><tr><th>caption \\ region</th>{table}</tr></table>"


def pictures(session: Session, place: int) -> tuple[np.ndarray | None, np.ndarray | None, str]:
    """Return the given mask and the one that came back, drawn on the image, and the IoU as text."""
    if session.image is None or not 0 <= place < len(session.regions):
        return None, None, ""
    region = session.regions[place]
    given = overlay(session.image, region.mask, GIVEN_COLOUR, SIDE)
    back = overlay(session.image, region.back, PREDICTED_COLOUR, SIDE, outline=region.mask)
    return np.asarray(given), np.asarray(back), f"IoU {session.matrix()[place, place]:.3f}"


class DemoPage:
    """The page: gradio components, and what happens when they are used; ``title`` says which weights answer."""

    def __init__(self, gr: ModuleType, predictor: Predictor, title: str) -> None:
        self.gr, self.logic = gr, DemoLogic(predictor)
        with gr.Blocks(title="dual_loop", analytics_enabled=False, delete_cache=(60, KEEP_SECONDS)) as self.app:
            gr.Markdown(f"# dual_loop\nmask → caption → mask: does the caption lead back? &nbsp; *{title}*")
            session = gr.State(Session(), time_to_live=6 * KEEP_SECONDS)
            with gr.Row():
                with gr.Column(scale=1):
                    editor = gr.ImageEditor(
                        label="1. Mark a region",
                        sources=["upload", "clipboard"],
                        brush=gr.Brush(default_size=14, colors=["#ff8c00"], color_mode="fixed"),
                        layers=False,
                        transforms=(),
                        elem_id="editor",
                        height=460,
                        format="png",  # a lossy format would change the image at every round
                    )
                    with gr.Row():
                        add = gr.Button("Caption what I drew", variant="primary", elem_id="add")
                        upload = gr.UploadButton("Upload masks", file_count="multiple", elem_id="upload", min_width=120)
                        clear = gr.Button("Start over", elem_id="clear", min_width=100)
                    scenes = [generate_scene(seed).image for seed in EXAMPLE_SEEDS]
                    gr.Examples(examples=scenes, inputs=editor, label="Examples")
                with gr.Column(scale=1):
                    status = gr.Markdown(START_TEXT, elem_id="status")
                    region = gr.Radio([], label="2. Region", elem_id="region", visible=False)
                    caption = gr.Textbox(label="3. Caption (edit it: the mask follows)", lines=2, elem_id="caption")
                    score = gr.Markdown("", elem_id="iou")
                    with gr.Row():
                        with gr.Column(min_width=160):
                            gr.Markdown("given mask")
                            given = gr.Image(show_label=False, interactive=False, elem_id="given", buttons=[])
                        with gr.Column(min_width=160):
                            gr.Markdown("mask that came back")
                            back = gr.Image(show_label=False, interactive=False, elem_id="back", buttons=[])
            gr.Markdown("### Does every caption pick its own region?")
            matrix = gr.HTML("", elem_id="matrix")
            shown = [session, status, region, caption, score, given, back, matrix]
            add.click(self.on_add, [session, editor], shown)
            upload.upload(self.on_add, [session, editor, upload], shown)
            clear.click(lambda: [None, *self.show(Session(), START_TEXT)], None, [editor, *shown])
            inputs, edited = [session, region, caption], [session, status, score, given, back, matrix]
            caption.input(self.on_edit, inputs, edited, trigger_mode="always_last", show_progress="hidden")
            region.input(self.on_choose, inputs[:2], [caption, score, given, back])

    def show(self, session: Session, text: str) -> list[object]:
        """Return the values of everything that is shown; the newest region is the chosen one.

        The editor keeps its strokes: setting its value from here would wipe what is being drawn.
        """
        given, back, iou = pictures(session, len(session.regions) - 1)
        names = [region.name for region in session.regions]
        words = session.regions[-1].caption if names else ""
        radio = self.gr.Radio(choices=names, value=names[-1] if names else None, visible=bool(names))
        return [session, text, radio, words, iou, given, back, matrix_html(session)]

    def on_add(self, session: Session, value: EditorValue | None, files: Sequence[str] | None = None) -> list[object]:
        """Caption what was drawn since the last region, or the regions of mask files."""
        image, drawn = read_drawing(value)
        try:
            if files is None:
                session = self.logic.add_drawing(session, image, drawn)
                text = "Draw the next region, or edit the caption. The thin outline is the given mask."
            else:
                try:
                    regions = read_uploads(files)
                finally:
                    _remove_uploads(files)
                session = self.logic.add_regions(session, image, regions)
                text = f"{len(regions)} region(s) added."
        except DualLoopError as error:
            text = _error(error)
        return self.show(session, text)

    def on_edit(self, session: Session, name: str | None, text: str) -> list[object]:
        """Segment the caption as it is now."""
        place = session.find(name)
        message = self.gr.skip()
        try:
            session = self.logic.edit(session, place, text)
        except DualLoopError as error:
            message = _error(error)
        given, back, iou = pictures(session, place)
        return [session, message, iou, given, back, matrix_html(session)]

    def on_choose(self, session: Session, name: str | None) -> list[object]:
        """Show another region."""
        place = session.find(name)
        given, back, iou = pictures(session, place)
        return [session.regions[place].caption if place >= 0 else "", iou, given, back]


def _remove_uploads(paths: Sequence[str]) -> None:
    """Remove files that a visitor sent; nothing outside of the server's own folder."""
    own = os.environ.get("GRADIO_TEMP_DIR")
    for path in map(Path, paths) if own else ():
        if path.resolve().is_relative_to(Path(str(own)).resolve()):
            path.unlink(missing_ok=True)


def _error(error: Exception) -> str:
    return f"**Error:** {html.escape(str(error))}"


Message = MutableMapping[str, Any]
"""Of the ASGI protocol."""


@dataclass(frozen=True)
class HostCheck:
    """ASGI middleware that refuses requests for any name but the server's own.

    A page on another site can point its own name at this machine (DNS rebinding); the browser then sends that name in
    ``Host``. An address in digits cannot be rebound and always passes.
    """

    app: Callable[..., Awaitable[None]]
    names: frozenset[str]

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        headers = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] == "lifespan" or (len(headers) == 1 and is_own_host(headers[0], self.names)):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"this server does not have that name; start it with --allow_host NAME if it should\n"
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": text})


def is_own_host(header: str, names: frozenset[str]) -> bool:
    """Tell whether a ``Host`` header holds an address in digits, ``localhost`` or one of ``names`` (lower case)."""
    try:
        name = (urlsplit(f"//{header}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if set("/@?#") & set(header):
        return False
    with suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in {"localhost", *names}


def serve(
    predictor: Predictor,
    host: str,
    port: int,
    title: str,
    *,
    auth: tuple[str, str] | None = None,
    max_queue: int = MAX_QUEUE,
    allow_host: Sequence[str] = (),
) -> None:
    """Run the server until it is stopped.

    Args:
        auth: name and password that visitors have to give.
        max_queue: questions that wait at most; more are refused.
        allow_host: names of this server, beside localhost, its addresses, ``host`` and, where others may come, the
            machine's own.

    Raises:
        EnvironmentProblem: gradio is not installed.
    """
    gr = import_gradio()
    own = [host, *allow_host, *([] if host in ("127.0.0.1", "localhost") else [socket.gethostname(), socket.getfqdn()])]
    names = frozenset(name.lower() for name in own)
    page = DemoPage(gr, predictor, title).app
    page.queue(max_size=max_queue, api_open=False, default_concurrency_limit=predictor.images_at_once).launch(
        auth=auth,
        app_kwargs={"middleware": [(HostCheck, (), {"names": names})]},
        state_session_capacity=MAX_SESSIONS,
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Soft(primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )


def check_port(host: str, port: int) -> None:
    """Look whether the port is free.

    Raises:
        EnvironmentProblem: it is taken, or the host is not this machine's.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            what, fix = "the server cannot listen", "choose another --port, or stop what listens there"
            raise EnvironmentProblem(explain(what, f"{host}:{port}", str(error), fix=fix)) from error


def import_gradio() -> ModuleType:
    """Return gradio, told to send nothing anywhere.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "GRADIO_TEMP_DIR" not in os.environ:  # read when gradio is imported
        os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="dual_loop_serve_")
        atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        fix = "pip install 'dual-loop[demo]', or DUAL_LOOP_EXTRAS=demo bash scripts/setup_env.sh"
        raise EnvironmentProblem(explain("the demo needs gradio", seen="not installed", fix=fix)) from error
