"""Fetching a model's files: HTTPS into a folder, cut connections taken up again, contents checked by sha256.

Only ``wsiengine models add URL`` comes here; running a model opens no connection. The transfers are those of
requests, which knows proxies and certificates. pooch, which is made for this task, follows redirects wherever they
lead and begins a cut download anew.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import requests

from wsiengine.errors import DownloadError, IntegrityError, OutputError
from wsiengine.models.integrity import file_sha256

_ATTEMPTS = 4
_PAUSE_S = 0.5
_MOST_REDIRECTS = 5
_MOST_BYTES = 8 << 30  # larger than any model of ours: what has no end must not fill the disk
_TIMEOUT_S = (15, 60)  # to connect, and between two pieces
_PIECE_BYTES = 1 << 16  # what a broken connection costs at most
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

Progress = Callable[[int, int | None], None]


def is_address(text: str) -> bool:
    """Whether ``text`` is an address rather than a path."""
    return "://" in text


def fetch(url: str, folder: Path, *, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """The file behind ``url``, in ``folder``.

    A file that is there and has ``sha256`` is not fetched again. What a broken connection left is gone on with, where
    the server tells that the file is still the same.

    Args:
        url: ``https://…``; plain ``http://`` only from this machine, or where ``sha256`` vouches for the contents.
        folder: Cache; made if need be.
        sha256: Hexadecimal digest that the file must have.
        progress: Called with bytes so far and in all (None where the server does not say).

    Raises:
        DownloadError: No connection, an error of the server, or a transfer that broke again and again.
        IntegrityError: Another sha256, an address of an unsafe kind, or a redirect to one.
        OutputError: The folder cannot be written.
    """
    check_address(url, sha256)
    path = folder / _cache_name(url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if sha256 is not None and path.is_file() and file_sha256(path) == sha256.lower():
            return path
        part = path.with_name(path.name + ".part")
        with requests.Session() as session:
            session.headers["Accept-Encoding"] = "identity"  # bytes as stored: they are counted and hashed
            _transfer(session, url, part, sha256, progress or _silent)
        _check_digest(part, url, sha256)
        part.replace(path)
        _note(part).unlink(missing_ok=True)
    except (OutputError, IntegrityError, DownloadError):
        raise
    except OSError as error:
        raise OutputError(
            f"Cannot write the download to {folder}: {error.strerror or error}.",
            hint="free some space, or set WSIENGINE_CONFIG to a folder that you may write to.",
        ) from error
    return path


def beside(url: str, name: str) -> str:
    """The address of the file ``name`` in the same folder as ``url``; a query (``?download=true``) is dropped."""
    return urljoin(urlsplit(url)._replace(query="", fragment="").geturl(), name)


def name_of(url: str) -> str:
    """The file's name, for suffixes and messages."""
    return unquote(urlsplit(url).path).rsplit("/", 1)[-1] or "download"


def _silent(done: int, total: int | None) -> None:
    pass


def _cache_name(url: str) -> str:
    """Unique for an address, and a safe file name whatever the address holds."""
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in name_of(url))[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{safe}"


def check_address(url: str, sha256: str | None) -> None:
    """Refuse addresses of an unsafe kind.

    Raises:
        IntegrityError: Neither https, nor http from this machine or vouched for by ``sha256``.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname:
        raise IntegrityError(
            f"{url} is no address that models are fetched from: needed https://…",
            hint="give the path itself for a file of this machine.",
        )
    if parts.scheme == "http" and sha256 is None and parts.hostname not in _LOOPBACK:
        raise IntegrityError(
            f"{url} is not encrypted: anybody on the way could change the model.",
            hint="use https://, or give the sha256 that the file must have with --sha256.",
        )


def _transfer(session: requests.Session, url: str, part: Path, sha256: str | None, progress: Progress) -> None:
    """Fill ``part``, going on after cuts."""
    problem = ""
    for attempt in range(_ATTEMPTS):
        time.sleep(attempt * _PAUSE_S)
        try:
            _attempt(session, url, part, sha256, progress)
            return
        except requests.RequestException as error:
            problem = _reason(error)
    kept = part.stat().st_size if part.exists() else 0
    raise DownloadError(
        f"{url} could not be fetched: {problem} ({kept:,} bytes are kept).",
        hint="check the address and the network, then run the same command again: it goes on from there.",
    )


def _attempt(session: requests.Session, url: str, part: Path, sha256: str | None, progress: Progress) -> None:
    have, tag = _kept(part)
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    with _open(session, url, headers, sha256) as response:
        if response.status_code == 416:  # what is there is longer than the file
            part.unlink(missing_ok=True)
            raise _Broken("the file changed on the server")
        if not response.ok:
            raise DownloadError(
                f"{url} could not be fetched: the server answered {response.status_code} {response.reason}.",
                hint="check the address.",
            )
        if response.status_code != 206 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the whole file comes, from its beginning
        _save(response, part, have, progress)


def _save(response: requests.Response, part: Path, have: int, progress: Progress) -> None:
    length = response.headers.get("Content-Length", "")
    total = have + int(length) if length.isdecimal() else None
    with part.open("r+b" if have else "wb") as file:
        file.truncate(have)
        file.seek(have)
        _note(part).write_text(json.dumps({"etag": response.headers.get("ETag")}))
        for piece in response.iter_content(_PIECE_BYTES):
            have += len(piece)
            if max(have, total or 0) > _MOST_BYTES:
                raise DownloadError(
                    f"{response.url} is larger than {_MOST_BYTES >> 30} GiB.", hint="check the address."
                )
            file.write(piece)
            progress(have, total)
    if total is not None and have != total:
        raise _Broken(f"the connection ended after {have:,} of {total:,} bytes")


def _open(session: requests.Session, url: str, headers: dict[str, str], sha256: str | None) -> requests.Response:
    """The response behind ``url``, following redirects that stay with the host, or whose goal sha256 vouches for."""
    at = url
    for _ in range(_MOST_REDIRECTS + 1):
        response = session.get(at, headers=headers, stream=True, timeout=_TIMEOUT_S, allow_redirects=False)
        if not response.is_redirect:
            return response
        response.close()
        goal = urljoin(at, response.headers["Location"])
        check_address(goal, sha256)
        if urlsplit(at).scheme == "https" and urlsplit(goal).scheme != "https":
            raise IntegrityError(
                f"{url} leads from https to {goal}, which is not encrypted.", hint="check the address."
            )
        if urlsplit(goal).hostname != urlsplit(url).hostname and sha256 is None:
            raise IntegrityError(
                f"{url} leads to another host, {urlsplit(goal).hostname}.",
                hint="give the sha256 that the file must have with --sha256, or fetch the file yourself and add that.",
            )
        at = goal
    raise DownloadError(f"{url} leads round in circles.", hint="check the address.")


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _kept(part: Path) -> tuple[int, str]:
    """Bytes of an earlier attempt and the server's tag of that file; nothing where it gave no strong tag."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        tag = json.loads(_note(part).read_text())["etag"]
        if isinstance(tag, str) and not tag.startswith("W/"):
            return part.stat().st_size, tag
    return 0, ""


def _check_digest(part: Path, url: str, sha256: str | None) -> None:
    if sha256 is None:
        return
    found = file_sha256(part)
    if found != sha256.lower():
        part.unlink()
        _note(part).unlink(missing_ok=True)
        raise IntegrityError(
            f"{url} has sha256 {found}, needed {sha256.lower()}; what came is thrown away.",
            hint="check the address and the sha256: the file was changed, or is another one.",
        )


class _Broken(requests.ConnectionError):
    """Told in our own words."""


def _reason(error: requests.RequestException) -> str:
    if isinstance(error, _Broken):
        return str(error)
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.exceptions.SSLError):
        return f"the server's certificate cannot be trusted: {str(error)[:200]}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "there is no connection to the server"
    return str(error)[:200]
