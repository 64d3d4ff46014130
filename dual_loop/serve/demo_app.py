"""The loop in a browser: mark an object or name it, read the caption, edit it, watch the mask that comes back.

The server is the standard library's. It keeps nothing of what visitors send: every question brings its picture, and the
page (``assets/serve``) remembers. It listens on 127.0.0.1 unless told otherwise, and the page loads nothing from
elsewhere.
"""

from __future__ import annotations

import base64
import hmac
import io
import ipaddress
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import jinja2
import numpy as np
from PIL import Image

from dual_loop.data.images import decoding, to_rgb
from dual_loop.data.limits import parse_json
from dual_loop.data.mask_files import read_mask
from dual_loop.data.masks import check_mask
from dual_loop.errors import DualLoopError, EnvironmentProblem, PromptError, SampleError, explain, shorten
from dual_loop.html import ASSETS
from dual_loop.serve.loading import TINY_NOTE
from dual_loop.serve.predictor import Predictor
from dual_loop.testing.scenes import generate_scene

SIDE = 1280
"""Longest side of a picture that the page asks about, in pixels; SAM 2 sees 1024."""
MAX_REGIONS = 8
MAX_BODY = 20 << 20
MAX_QUEUE = 32
PATIENCE = 30
"""Seconds that a visitor may take to send a question."""
EXAMPLE_SEEDS = (1003, 1002, 1011)
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
Asked: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """What the page asks: JSON objects in and out, with PNG or JPEG pictures in them as ``data:`` addresses.

    Every method raises ``DualLoopError`` with what is wrong in a question; masks are 0 and 255 at the picture's size.
    """

    predictor: Predictor

    @property
    def knows_boxes(self) -> bool:
        """Whether the model's SAM 2 has learned boxes; else the area of a box is its region."""
        return not self.predictor.loaded.is_tiny

    def region(self, asked: Asked) -> Asked:
        """Return the ``mask`` of the object at a ``point`` (x, y) or in a ``box`` (x1, y1, x2, y2) of an ``image``."""
        image = _read_image(asked)
        if "box" in asked:
            mask = self.predictor.region_from_box(image, asked["box"], refine=self.knows_boxes)
        else:
            mask = self.predictor.region_from_point(image, asked.get("point", ()))
        return {"mask": _png(mask)}

    def masks(self, asked: Asked) -> Asked:
        """Return the ``masks`` of a mask file for a picture of ``width`` and ``height``, at most ``SIDE`` a side.

        The file comes with its ``name``, and its contents as base64 in ``data``.
        """
        name, size = Path(str(asked.get("name"))).name, (asked.get("height"), asked.get("width"))
        try:
            found = read_mask(Path(name), contents=_decode(asked.get("data")))
            check_mask(found.values != 0, name)
        except SampleError as error:
            expected = "a PNG mask: 0 and 255, or labels"
            message = explain("a mask file cannot be used", name, error.reason.replace("_", " "), expected)
            raise SampleError(error.reason, message) from error
        shape = found.values.shape[-2:]
        if shape != size:
            fix = "draw the mask on this very image"
            raise SampleError("size_mismatch", explain("a mask and the image differ in size", name, shape, size, fix))
        if len(found.labels) > MAX_REGIONS:
            seen, expected = f"{len(found.labels)} objects", f"at most {MAX_REGIONS}"
            raise SampleError("too_many", explain("too many regions", name, seen, expected))
        stem = Path(name).stem
        masks = [(f"{stem}#{word}" if word else stem, found.mask(label)) for word, label in found.labels.items()]
        return {"masks": [{"name": one, "mask": _png(mask)} for one, mask in masks]}

    def loop(self, asked: Asked) -> Asked:
        """Caption the ``masks`` of an ``image`` and segment the captions: ``regions`` of caption, rejected and mask."""
        image, given = _read_image(asked), asked.get("masks")
        if not isinstance(given, list) or not 0 < len(given) <= MAX_REGIONS:
            seen = len(given) if isinstance(given, list) else given
            raise SampleError("too_many", explain("not that many regions", "masks", seen, f"1 to {MAX_REGIONS}"))
        masks = [np.asarray(_open_picture(one, "the mask").convert("L")) > 127 for one in given]
        if any(mask.shape != image.shape[:2] for mask in masks):
            seen = [mask.shape for mask in masks]
            raise SampleError("size_mismatch", explain("masks and image differ in size", "", seen, image.shape[:2]))
        result = self.predictor.loop(image, np.stack(masks))
        rows = zip(result.captions, result.rejected, result.masks, strict=True)
        return {"regions": [{"caption": c, "rejected": r, "mask": _png(mask)} for c, r, mask in rows]}

    def segment(self, asked: Asked) -> Asked:
        """Return the ``mask`` of what a ``text`` describes in an ``image``, and its ``pixels``."""
        text = asked.get("text")
        if not isinstance(text, str) or not text.strip():
            raise PromptError(explain("an empty text names nothing", "text", shorten(text), "what to segment"))
        mask = self.predictor.segment(_read_image(asked), text)[0].mask
        return {"mask": _png(mask), "pixels": int(mask.sum())}


def _decode(text: object) -> io.BytesIO:
    try:
        return io.BytesIO(base64.b64decode(str(text), validate=True))
    except ValueError as error:
        raise SampleError("not_an_image", explain("a file did not arrive", seen=error, expected="base64")) from error


def _open_picture(url: object, where: str) -> Image.Image:
    """Decode a picture of a ``data:`` address, of as many pixels as the page sends."""
    with decoding(_decode(str(url).partition(",")[2]), where) as image:
        if image.width * image.height > SIDE * SIDE:
            seen = f"{image.width} x {image.height} pixels"
            raise SampleError("too_large", explain("an image is too large", where, seen, f"{SIDE} a side"))
        image.load()
        return image


def _read_image(asked: Asked) -> np.ndarray:
    if not asked.get("image"):
        raise SampleError("not_an_image", explain("no image is open", fix="open one, or choose an example"))
    return to_rgb(_open_picture(asked["image"], "the image"), "the image")


def _png(mask: np.ndarray) -> str:
    """Return a mask (H, W) bool as a PNG in a ``data:`` address, at most ``SIDE`` a side."""
    image, stream = Image.fromarray(mask.astype(np.uint8) * 255), io.BytesIO()
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    image.point(lambda value: 255 * (value > 127)).save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


class PageServer(ThreadingHTTPServer):
    """Listens from the start, and answers once :meth:`run` is called.

    Args:
        auth: name and password that visitors have to give.
        max_queue: questions that wait at most; more are refused.
        allow_host: names of this server, beside localhost, its addresses, ``host`` and, where others may come, the
            machine's own.

    Raises:
        EnvironmentProblem: the port is taken, or the host is not this machine's.
    """

    daemon_threads = True

    def __init__(
        self,
        host: str,
        port: int,
        *,
        auth: tuple[str, str] | None = None,
        max_queue: int = MAX_QUEUE,
        allow_host: Sequence[str] = (),
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.login = auth and b"Basic " + base64.b64encode(":".join(auth).encode())
        self.places = threading.BoundedSemaphore(max_queue + Predictor.images_at_once)
        own = [] if host in ("127.0.0.1", "localhost") else [socket.gethostname(), socket.getfqdn()]
        self.names = frozenset(name.lower() for name in (host, *allow_host, *own))
        self.files: dict[str, tuple[str, bytes]] = {}
        self.questions: dict[str, Callable[[Asked], Asked]] = {}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            what, fix = "the server cannot listen", "choose another --port, or stop what listens there"
            raise EnvironmentProblem(explain(what, f"{host}:{port}", str(error), fix=fix)) from error

    def run(self, predictor: Predictor, title: str) -> None:
        """Answer visitors until Ctrl-C; ``title`` says which weights answer."""
        answers, folder = Answers(predictor), ASSETS / "serve"
        questions = (answers.region, answers.masks, answers.loop, answers.segment)
        self.questions = {f"/{question.__name__}": question for question in questions}
        page = jinja2.Template((folder / "index.html").read_text(encoding="utf-8"), autoescape=True).render(
            title=title,
            note=TINY_NOTE if predictor.loaded.is_tiny else None,
            boxes="sam2" if answers.knows_boxes else "area",
            side=SIDE,
            regions=MAX_REGIONS,
            examples=len(EXAMPLE_SEEDS),
        )
        self.files = {
            "/": ("text/html; charset=utf-8", page.encode()),
            "/page.css": ("text/css; charset=utf-8", (folder / "page.css").read_bytes()),
            "/page.js": ("text/javascript; charset=utf-8", (folder / "page.js").read_bytes()),
        }
        for number, seed in enumerate(EXAMPLE_SEEDS):
            stream = io.BytesIO()
            Image.fromarray(generate_scene(seed).image).save(stream, "PNG")
            self.files[f"/example/{number}.png"] = ("image/png", stream.getvalue())
        with suppress(KeyboardInterrupt):
            self.serve_forever()


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self._is_admitted():
            found = self.server.files.get(self.path.partition("?")[0])
            self._send(200, *found) if found else self._refuse(404, "there is no such page")

    def do_POST(self) -> None:
        if not self._is_admitted():
            return
        question, length = self.server.questions.get(self.path), self.headers.get("Content-Length", "")
        if question is None:
            self._refuse(404, "there is no such question")
        # A page of another site can send a form, but no JSON without asking this server first.
        elif self.headers.get_content_type() != "application/json":
            self._refuse(415, "a question is JSON")
        elif not length.isdecimal() or int(length) > MAX_BODY:
            self._refuse(413, f"a question is at most {MAX_BODY >> 20} MB; choose a smaller file")
        elif not self.server.places.acquire(blocking=False):
            self._refuse(503, "too many questions wait; ask again in a moment")
        else:
            try:
                self._answer(question, int(length))
            finally:
                self.server.places.release()

    def _answer(self, question: Callable[[Asked], Asked], length: int) -> None:
        try:
            asked = parse_json(self.rfile.read(length))
            if not isinstance(asked, dict):
                raise ValueError("it is no object")
        except ValueError as error:
            return self._refuse(400, explain("a question cannot be read", seen=error, expected="a JSON object"))
        try:
            answer = json.dumps(question(asked)).encode()
        except DualLoopError as error:
            return self._refuse(400, str(error))
        except Exception:
            self._refuse(500, "the server failed; its terminal says how")
            raise
        self._send(200, "application/json", answer)

    def _is_admitted(self) -> bool:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not is_own_host(hosts[0], self.server.names):
            self._refuse(421, "this server does not have that name; start it with --allow_host NAME if it should")
            return False
        given = self.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self.server.login and not hmac.compare_digest(given, self.server.login):
            self._refuse(401, "name and password, please")
            return False
        return True

    def _refuse(self, status: int, text: str) -> None:
        self._send(status, "application/json", json.dumps({"error": text}).encode())

    def _send(self, status: int, content_type: str, content: bytes) -> None:
        self.send_response(status)
        login = {"WWW-Authenticate": 'Basic realm="dual_loop", charset="UTF-8"'} if status == 401 else {}
        about = {"Content-Type": content_type, "Content-Length": str(len(content))}
        for name, value in {**about, **HEADERS, **login}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def version_string(self) -> str:
        """Say nothing about the machine."""
        return "dual_loop"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing about visitors."""


def is_own_host(header: str, names: frozenset[str]) -> bool:
    """Tell whether a ``Host`` header holds an address in digits, ``localhost`` or one of ``names`` (lower case).

    A page on another site can point its own name at this machine (DNS rebinding); the browser then sends that name in
    ``Host``. An address in digits cannot be rebound and always passes.
    """
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
