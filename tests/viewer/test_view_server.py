"""The viewer's server over HTTP: what it serves, and what it refuses."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from viewer_run import ODD, Run

from wsiseg.errors import SlideError, UsageError
from wsiseg.outputs.run_folder import SlideResult
from wsiseg.slides import open_slide
from wsiseg.viewer.locate import find_slide
from wsiseg.viewer.pool import Pool
from wsiseg.viewer.server import Server, Site


def get(server: Server, path: str) -> bytes:
    with urllib.request.urlopen(server.url + path, timeout=20) as answer:
        return bytes(answer.read())


def status(server: Server, path: str, method: str = "GET", **headers: str) -> int:
    """Of a request with a path as it stands and headers of choice."""
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    code = connection.getresponse().status
    connection.close()
    return code


def info(server: Server, number: int) -> dict[str, Any]:
    return dict(json.loads(get(server, f"slides/{number}/info.json")))


def test_it_listens_on_loopback_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert urlsplit(server.url).hostname == "127.0.0.1"


def test_pages_and_pictures(server: Server) -> None:
    report = get(server, "").decode()
    assert report.count('href="slides/') == 4  # name and preview of two slides
    assert "<!doctype html>" in get(server, "slides/0/").decode()
    assert b"class Pyramid" in get(server, "assets/pyramid.js")
    assert Image.open(io.BytesIO(get(server, "slides/1/overview.jpg"))).format == "JPEG"


def test_slide_tiles_are_the_slide(server: Server, made_run: Run) -> None:
    levels = info(server, 0)["slide_levels"]
    assert [level["size"] for level in levels] == [[1300, 1100], [650, 550], [325, 275]]
    with open_slide(made_run.slides / "below" / "a.tif") as slide:
        for number, level in enumerate(levels):
            grid = slide.grid(slide.mpp * 2**number)
            assert level["downsample"] == list(grid.downsample)
            wanted = slide.read(grid.box, grid).astype(int)
            width, height = level["size"]
            shown = np.zeros((height, width, 3), int)
            for row in range(-(-height // 512)):
                for column in range(-(-width // 512)):
                    data = get(server, f"slides/0/slide/{number}/{column}/{row}")
                    part = np.asarray(Image.open(io.BytesIO(data)))
                    y, x = row * 512, column * 512
                    assert part.shape[:2] == (min(512, height - y), min(512, width - x))
                    shown[y : y + 512, x : x + 512] = part
            assert np.abs(shown - wanted).mean() < 4  # JPEG


def test_mask_tiles_are_the_labels(server: Server, made_run: Run) -> None:
    levels = info(server, 0)["mask_levels"]
    assert levels[0] == {"size": [650, 550], "downsample": [2.0, 2.0]}
    assert levels[1] == {"size": [325, 275], "downsample": [4.0, 4.0]}
    tile = np.frombuffer(get(server, "slides/0/mask/0/1/1"), np.uint8).reshape(38, 138)
    assert np.array_equal(tile, made_run.labels[512:, 512:])
    assert len(np.unique(get(server, "slides/0/mask/1/0/0"))) >= 1


def test_mask_tiles_travel_packed(server: Server) -> None:
    request = urllib.request.Request(
        server.url + "slides/0/mask/0/0/0", headers={"Accept-Encoding": "gzip"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Encoding"] == "gzip"
        data = answer.read()
    assert len(data) < 512 * 512 / 4
    assert gzip.decompress(data) == get(server, "slides/0/mask/0/0/0")


def test_info_names_what_the_page_shows(server: Server) -> None:
    shown = info(server, 1)
    assert (shown["name"], shown["problems"], shown["count"]) == (f"{ODD}.tif", [], 2)
    assert [c["name"] for c in shown["classes"]] == ["Stroma <i>", "Gland"]
    assert shown["mpp"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "path",
    [
        "slides/2/",
        "slides/99999999999/info.json",
        "slides/-1/info.json",
        "slides/0/slide/9/0/0",
        "slides/0/slide/0/3/0",
        "slides/0/slide/0/0/3",
        "slides/0/mask/7/0/0",
        "slides/0/mask/0/2/0",
        "slides/0/../../a.json",
        "a.json",
        "assets/../server.py",
        "assets/..%2fserver.py",
        "assets/other.js",
        "%2e%2e/%2e%2e/etc/passwd",
        "../../../../etc/passwd",
        "/etc/passwd",
        "slides/0/info.json/",
        "slides/٣/",
    ],
)
def test_other_addresses_are_not_found(server: Server, path: str) -> None:
    base = urlsplit(server.url).path
    raw = (base + path).encode().decode("latin-1")
    connection = http.client.HTTPConnection(*server.server_address, timeout=20)
    connection._validate_path = lambda url: None  # type: ignore[attr-defined]
    connection._encode_request = lambda text: text.encode("latin-1")  # type: ignore[attr-defined]
    connection.request("GET", raw)
    assert connection.getresponse().status == 404
    connection.close()


def test_without_the_secret_nothing_is_told(server: Server) -> None:
    secret = urlsplit(server.url).path
    assert status(server, secret) == 200
    for path in ("/", secret[:-1], secret[:-2] + "/", "/x" + secret, "/slides/0/info.json", "*"):
        assert status(server, path) == 403


def test_other_hosts_are_refused(server: Server) -> None:
    path, port = urlsplit(server.url).path, server.server_address[1]
    for good in ("localhost", f"127.0.0.1:{port}", "LOCALHOST:8042", "[::1]:1"):
        assert status(server, path, Host=good) == 200
    for bad in ("evil.example", f"evil.example:{port}", "", "127.0.0.1.evil.example", "localhost:"):
        assert status(server, path, Host=bad) == 403


def test_each_start_has_its_own_secret(server: Server) -> None:
    other = Server(Site(server.site.folder))
    other.server_close()
    assert urlsplit(other.url).path != urlsplit(server.url).path


def test_it_only_reads(server: Server) -> None:
    path = urlsplit(server.url).path
    assert status(server, path, "HEAD") == 200
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
        assert status(server, path, method) == 501


def test_a_page_of_another_site_cannot_use_it(server: Server) -> None:
    with urllib.request.urlopen(server.url, timeout=20) as answer:
        headers = answer.headers
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "Access-Control-Allow-Origin" not in headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe-inline" not in headers["Content-Security-Policy"].split("style-src")[0]


def test_a_slide_that_is_not_there_or_another_one_is_not_shown(
    made_run: Run, tmp_path: Path
) -> None:
    below = made_run.slides / "below"
    other = tmp_path / "slides"
    other.mkdir()
    shutil.copy(below / f"{ODD}.tif", other / "a.tif")
    with closing(Site(made_run.out)) as site:
        assert "was not found" in json.loads(site.answer("slides/0/info.json").body)["problems"][0]
    with closing(Site(made_run.out, (other,))) as site:
        shown = json.loads(site.answer("slides/0/info.json").body)
        assert "another slide of that name" in shown["problems"][0]
        assert shown["slide_levels"] == []
        assert site.answer("slides/0/slide/0/0/0").status == 404
        assert site.answer("slides/0/mask/0/0/0").status == 200
    with closing(Site(made_run.out, (other, below))) as site:  # of two of that name, the right one
        assert json.loads(site.answer("slides/0/info.json").body)["problems"] == []


def test_a_slide_that_comes_later_is_shown(made_run: Run, tmp_path: Path) -> None:
    with closing(Site(made_run.out, (tmp_path,))) as site:
        assert "was not found" in json.loads(site.answer("slides/0/info.json").body)["problems"][0]
        linked = tmp_path / "linked"
        linked.symlink_to(made_run.slides, target_is_directory=True)
        (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
        assert json.loads(site.answer("slides/0/info.json").body)["problems"] == []
        assert site.answer("slides/0/slide/0/0/0").kind == "image/jpeg"


def test_a_slide_without_a_record_is_not_called_another(made_run: Run) -> None:
    result = SlideResult("a", slide="a.tif", status="failed")
    with pytest.raises(SlideError, match="no record tells what was analysed"):
        find_slide(result, (made_run.slides,))


def test_a_damaged_mask_is_said(made_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made_run.out, out)
    (out / "a.mask.ome.tif").write_bytes(b"II*\0 nothing")
    with closing(Site(out, (made_run.slides,))) as site:
        shown = json.loads(site.answer("slides/0/info.json").body)
    assert shown["mask_levels"] == []
    assert "The mask cannot be shown" in shown["problems"][0]


def test_the_mask_of_another_analysis_is_not_shown(made_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made_run.out, out)
    record = json.loads((out / "a.json").read_text())
    record["mask"]["size"][1] -= 1
    (out / "a.json").write_text(json.dumps(record))
    with closing(Site(out, (made_run.slides,))) as site:
        shown = json.loads(site.answer("slides/0/info.json").body)
    assert shown["mask_levels"] == []
    assert "the mask is not that of its record" in shown["problems"][0]


class Fake:
    """Counts what is open."""

    opened = 0

    def __init__(self) -> None:
        Fake.opened += 1
        self.closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True
        Fake.opened -= 1


def test_the_pool_keeps_few_open_and_none_that_is_read_is_closed() -> None:
    pool: Any = Pool(lambda number: Fake(), limit=2)  # type: ignore[arg-type, return-value]

    def use(seed: int) -> None:
        for number in np.random.default_rng(seed).integers(0, 6, 200):
            with pool.borrow(int(number)) as view:
                assert not view.closed

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Fake.opened == 2
    pool.close()
    assert Fake.opened == 0


def test_many_at_once(server: Server) -> None:
    paths = [f"slides/{s}/slide/0/{x}/{y}" for s in (0, 1) for x in range(3) for y in range(3)]
    once = [get(server, p) for p in paths]
    seen: dict[str, bytes] = {}
    threads = [
        threading.Thread(target=lambda p=p: seen.__setitem__(p, get(server, p))) for p in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [seen[p] for p in paths] == once


def test_bad_requests_are_refused(made_run: Run, tmp_path: Path, server: Server) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        Site(made_run.out, (tmp_path / "no",))
    with pytest.raises(UsageError, match="cannot be had"):
        Server(server.site, server.server_address[1])


def test_the_command_ends_with_ctrl_c(made_run: Run) -> None:
    command = [sys.executable, "-m", "wsiseg.cli", "view", str(made_run.out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{20,}/", url)
    with urllib.request.urlopen(url, timeout=20) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in out + err
