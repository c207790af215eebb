"""A web server on this machine that serves a folder, and can misbehave."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site:
    """What the server does, changed while it runs.

    Attributes:
        address: Its root.
        cut_after: Bytes after which the connection is cut, once for each entry.
        redirects: Path → where it leads.
        tags: Whether files have ETags, and ranges are served.
        asked: (path, Range header) of every request.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.cut_after: list[int] = []
        self.redirects: dict[str, str] = {}
        self.tags = True
        self.asked: list[tuple[str, str | None]] = []


@contextmanager
def serving(folder: Path) -> Iterator[Site]:
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            site.asked.append((self.path, asked))
            if self.path in site.redirects:
                return self._head(302, {"Location": site.redirects[self.path], "Content-Length": "0"})
            path = site.folder / self.path.lstrip("/").split("?")[0]
            if not path.is_file():
                return self._head(404, {"Content-Length": "0"})
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
            extra = {"ETag": tag} if site.tags else {}
            start = 0
            if asked and site.tags and self.headers.get("If-Range") == tag:
                start = int(asked.removeprefix("bytes=").rstrip("-"))
                extra["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._head(206 if start else 200, {**extra, "Content-Length": str(len(data) - start)})
            body = data[start:]
            if site.cut_after:
                self.wfile.write(body[: site.cut_after.pop(0)])
                self.close_connection = True
                return None
            self.wfile.write(body)
            return None

        def _head(self, code: int, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
