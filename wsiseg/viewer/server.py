"""Serves the report of a run and its slides to a browser on this machine. Knows no pixels.

Who may look: the server listens on the loopback address only, answers only requests whose Host
is a name of that address (so that no page of another site can reach it by a name of its own),
and only under a secret path that is made for each start, which other users of the machine do not
know. It reads nothing but the slides and outputs of the run, which are addressed by number.
"""

from __future__ import annotations

import gzip
import hmac
import json
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from wsiseg.errors import UsageError, WsisegError
from wsiseg.outputs.run_folder import SlideResult, read_run
from wsiseg.viewer.pool import Pool
from wsiseg.viewer.report import Links, render_report, script_hash
from wsiseg.viewer.thumbnails import thumbnail
from wsiseg.viewer.tiles import SlideView

HOST = "127.0.0.1"
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_IDLE_S = 60
_THUMBNAIL_PX = 640
_ASSETS = {
    "viewer.js": "text/javascript; charset=utf-8",
    "viewer.css": "text/css; charset=utf-8",
    "paint.js": "text/javascript; charset=utf-8",
    "pyramid.js": "text/javascript; charset=utf-8",
}
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": f"default-src 'none'; script-src 'self' {script_hash()}; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}


class Answer(NamedTuple):
    """The body of a response and what it is."""

    body: bytes
    kind: str
    status: int = 200
    packed: bool = False
    keep: bool = False


class Site:
    """The pages of a run: from a path below the secret one to an answer."""

    def __init__(self, folder: Path, slides: Sequence[Path] = ()) -> None:
        """Read a run.

        Args:
            folder: with the outputs.
            slides: folders in which, and below which, the slides are looked for; beside the
                outputs and in the folder above them they always are.

        Raises:
            UsageError: a folder is missing or holds no result.
        """
        for place in slides:
            if not place.is_dir():
                raise UsageError(f"--slides {place}: no such folder")
        self.folder = folder
        self.results: list[SlideResult] = read_run(folder)
        self._nearby = (folder, folder.resolve().parent)
        self._slides = slides
        self._pool = Pool(self._open)
        self._routes: list[tuple[re.Pattern[str], Callable[..., Answer]]] = [
            (re.compile(r""), self._report),
            (re.compile(r"assets/([a-z]+\.(?:js|css))"), self._asset),
            (re.compile(r"slides/(\d{1,7})/"), self._viewer),
            (re.compile(r"slides/(\d{1,7})/info\.json"), self._info),
            (re.compile(r"slides/(\d{1,7})/overview\.jpg"), self._overview),
            (re.compile(r"slides/(\d{1,7})/slide/(\d{1,2})/(\d{1,6})/(\d{1,6})"), self._slide),
            (re.compile(r"slides/(\d{1,7})/mask/(\d{1,2})/(\d{1,6})/(\d{1,6})"), self._mask),
        ]

    def answer(self, path: str) -> Answer:
        """The answer to a path without its leading secret."""
        for pattern, action in self._routes:
            match = pattern.fullmatch(path)
            if match is not None:
                try:
                    return action(*match.groups())
                except IndexError:
                    break
                except WsisegError as e:
                    return Answer(
                        str(e).encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8", 500
                    )
        return Answer(b"not found", "text/plain; charset=utf-8", 404)

    def close(self) -> None:
        """Release the slides."""
        self._pool.close()

    def _open(self, number: int) -> SlideView:
        return SlideView(self.results[number], self._slides, nearby=self._nearby)

    def _report(self) -> Answer:
        made = self.results
        links = Links(
            page=lambda n: f"slides/{n}/",
            picture=lambda n: f"slides/{n}/overview.jpg" if "overview" in made[n].files else None,
        )
        text = render_report(self.folder, self.results, links)
        return Answer(text.encode(), "text/html; charset=utf-8", packed=True)

    def _asset(self, name: str) -> Answer:
        if name not in _ASSETS:
            raise IndexError(name)
        return Answer(_asset(name), _ASSETS[name])

    def _viewer(self, number: str) -> Answer:
        self.results[int(number)]
        return Answer(_asset("viewer.html"), "text/html; charset=utf-8")

    def _info(self, number: str) -> Answer:
        with self._pool.borrow(self._number(number), again=True) as view:
            data = {**view.info(), "number": int(number), "count": len(self.results)}
        return Answer(json.dumps(data).encode(), "application/json")

    def _overview(self, number: str) -> Answer:
        path = self.results[int(number)].files.get("overview")
        data = None if path is None else thumbnail(path, _THUMBNAIL_PX)
        if data is None:
            raise IndexError(number)
        return Answer(data, "image/jpeg", keep=True)

    def _slide(self, number: str, level: str, column: str, row: str) -> Answer:
        with self._pool.borrow(self._number(number)) as view:
            data = view.slide_tile(int(level), int(column), int(row))
        return Answer(data, "image/jpeg", keep=True)

    def _mask(self, number: str, level: str, column: str, row: str) -> Answer:
        with self._pool.borrow(self._number(number)) as view:
            data = view.mask_tile(int(level), int(column), int(row))
        return Answer(data, "application/octet-stream", packed=True, keep=True)

    def _number(self, text: str) -> int:
        self.results[int(text)]
        return int(text)


class Server(ThreadingHTTPServer):
    """A site on the loopback address.

    Attributes:
        site: what is served.
        url: where it is, with the secret path.
    """

    daemon_threads = True

    def __init__(self, site: Site, port: int = 0) -> None:
        """Listen on a port; 0 takes a free one.

        Raises:
            UsageError: the port cannot be had.
        """
        self.site = site
        self._secret = secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as e:
            reason = getattr(e, "strerror", None) or str(e)
            raise UsageError(f"--port {port}: cannot be had ({reason}); choose another") from e
        self.url = f"http://{HOST}:{self.server_address[1]}/{self._secret}/"

    def inside(self, path: str) -> str | None:
        """The part of a path after the secret; None where the secret is not the right one."""
        first, slash, rest = path.removeprefix("/").partition("/")
        known = hmac.compare_digest(first.encode(), self._secret.encode())
        return rest if known and slash else None

    def server_close(self) -> None:
        """Stop listening and release the slides."""
        super().server_close()
        self.site.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of browsers that went away; of everything else, what happened."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "wsiseg"
    sys_version = ""
    timeout = _IDLE_S
    server: Server

    def do_GET(self) -> None:
        """Answer with headers and body."""
        self._respond(body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers alone."""
        self._respond(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a line a tile helps nobody."""

    def _respond(self, *, body: bool) -> None:
        answer = self._answer()
        content = answer.body
        packed = answer.packed and "gzip" in self.headers.get("Accept-Encoding", "")
        if packed:
            content = gzip.compress(content, 1, mtime=0)
        self.send_response(answer.status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "private, max-age=3600" if answer.keep else "no-store")
        if packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _answer(self) -> Answer:
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or re.sub(r":\d+$", "", hosts[0]).lower() not in _NAMES:
            return Answer(b"this server answers as localhost only", "text/plain", 403)
        inside = self.server.inside(self.path.partition("?")[0])
        if inside is None:
            text = b"open the whole address that wsiseg view printed"
            return Answer(text, "text/plain; charset=utf-8", 403)
        return self.server.site.answer(inside)


def _asset(name: str) -> bytes:
    return (files("wsiseg.viewer") / "assets" / name).read_bytes()
