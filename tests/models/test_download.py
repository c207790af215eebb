"""Fetching: whole, again, after cuts; what leads elsewhere or is something else is refused in words."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.models.web import Site, serving
from wsiengine.errors import DownloadError, IntegrityError, OutputError
from wsiengine.models import download
from wsiengine.models.download import _cache_name, fetch

DATA = np.random.default_rng(5).bytes(3_000_017)
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "model.zip").write_bytes(DATA)
    with serving(tmp_path / "site") as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_a_file_is_fetched_and_kept(site: Site, cache: Path) -> None:
    told: list[tuple[int, int | None]] = []
    path = fetch(f"{site.address}/model.zip", cache, sha256=SHA, progress=lambda *a: told.append(a))
    assert path.read_bytes() == DATA
    assert told[-1] == (len(DATA), len(DATA))
    assert fetch(f"{site.address}/model.zip", cache, sha256=SHA.upper()) == path
    assert len(site.asked) == 1  # the second time it was there
    assert [p.name for p in cache.iterdir()] == [path.name]
    fetch(f"{site.address}/model.zip", cache)
    assert len(site.asked) == 2  # without sha256 nobody knows whether it is still the same


def test_a_kept_file_that_was_damaged_is_fetched_again(site: Site, cache: Path) -> None:
    path = fetch(f"{site.address}/model.zip", cache, sha256=SHA)
    path.write_bytes(DATA[:-1] + b"x")
    assert fetch(f"{site.address}/model.zip", cache, sha256=SHA).read_bytes() == DATA


def test_a_cut_connection_is_gone_on_with(site: Site, cache: Path) -> None:
    site.cut_after = [1_000_000, 500_000]
    assert fetch(f"{site.address}/model.zip", cache, sha256=SHA).read_bytes() == DATA
    assert [asked for _, asked in site.asked] == [
        None,
        f"bytes={15 << 16}-",
        f"bytes={22 << 16}-",
    ]  # whole pieces of 64 KiB


def test_without_a_tag_a_cut_download_begins_anew(site: Site, cache: Path) -> None:
    site.tags, site.cut_after = False, [1_000_000]
    assert fetch(f"{site.address}/model.zip", cache, sha256=SHA).read_bytes() == DATA
    assert [asked for _, asked in site.asked] == [None, None]


def test_a_file_that_changed_meanwhile_is_not_mixed(site: Site, cache: Path) -> None:
    site.cut_after = [100_000] * 4
    with pytest.raises(DownloadError, match="bytes are kept"):
        fetch(f"{site.address}/model.zip", cache)
    (site.folder / "model.zip").write_bytes(DATA[::-1])
    site.cut_after = []
    assert fetch(f"{site.address}/model.zip", cache).read_bytes() == DATA[::-1]


def test_a_connection_that_always_breaks_is_said_and_the_next_call_goes_on(site: Site, cache: Path) -> None:
    site.cut_after = [100_000] * 4
    with pytest.raises(
        DownloadError, match=r"could not be fetched: the connection broke \(262,144 bytes are kept\)"
    ) as caught:
        fetch(f"{site.address}/model.zip", cache, sha256=SHA)
    assert "goes on from there" in (caught.value.hint or "")
    assert fetch(f"{site.address}/model.zip", cache, sha256=SHA).read_bytes() == DATA
    assert site.asked[-1][1] == "bytes=262144-"


def test_another_sha256_leaves_nothing_behind(site: Site, cache: Path) -> None:
    with pytest.raises(IntegrityError) as caught:
        fetch(f"{site.address}/model.zip", cache, sha256="0" * 64)
    assert SHA in caught.value.message
    assert "0" * 64 in caught.value.message
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://host/m.zip", "https:///m.zip", "data://x"])
def test_other_kinds_of_addresses(url: str, cache: Path) -> None:
    with pytest.raises(IntegrityError, match="needed https://"):
        fetch(url, cache)
    assert not cache.exists()


def test_plain_http_from_elsewhere_needs_a_sha256(cache: Path) -> None:
    with pytest.raises(IntegrityError, match="not encrypted"):
        fetch("http://models.example/m.zip", cache)


@pytest.mark.parametrize("goal", ["file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_a_redirect_to_another_kind_of_address(goal: str, site: Site, cache: Path) -> None:
    site.redirects["/here"] = goal
    with pytest.raises(IntegrityError, match="needed https://"):
        fetch(f"{site.address}/here", cache, sha256=SHA)


def test_a_redirect_to_another_host_needs_a_sha256(site: Site, cache: Path) -> None:
    site.redirects["/here"] = site.address.replace("127.0.0.1", "localhost") + "/model.zip"
    with pytest.raises(IntegrityError, match="leads to another host, localhost") as caught:
        fetch(f"{site.address}/here", cache)
    assert "--sha256" in (caught.value.hint or "")
    assert fetch(f"{site.address}/here", cache, sha256=SHA).read_bytes() == DATA
    site.redirects["/same"] = "/model.zip"
    assert fetch(f"{site.address}/same", cache).read_bytes() == DATA


def test_redirects_in_a_circle(site: Site, cache: Path) -> None:
    site.redirects["/here"] = "/here"
    with pytest.raises(DownloadError, match="round in circles"):
        fetch(f"{site.address}/here", cache)


def test_no_such_file_and_no_such_server(site: Site, cache: Path) -> None:
    with pytest.raises(DownloadError, match="answered 404"):
        fetch(f"{site.address}/nothing.zip", cache)
    with pytest.raises(DownloadError, match="there is no connection to the server"):
        fetch("http://127.0.0.1:9/m.zip", cache)


def test_what_has_no_end_is_refused(site: Site, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_MOST_BYTES", 1 << 20)
    with pytest.raises(DownloadError, match="larger than"):
        fetch(f"{site.address}/model.zip", cache)


def test_a_cache_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write the download"):
        fetch(f"{site.address}/model.zip", tmp_path / "file")


@pytest.mark.parametrize("name", ["..%2f..%2fx", "%2e%2e", "a b;c", "x" * 300])
def test_names_of_addresses_never_leave_the_cache(name: str, cache: Path) -> None:
    kept = cache / _cache_name(f"https://host/{name}?a=/../../b")
    assert kept.parent == cache
    assert kept.resolve().parent == cache.resolve()
    assert len(kept.name) < 120
