"""The page as a real server: who can reach it, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from fading import SIZE, FadingSearcher, Known
from speaking import Run, Running, photo_bytes
from typer.main import get_command

from fedface.cli import app
from fedface.errors import ConfigError, FedfaceError
from fedface.photos.face_alignment import Face
from fedface.photos.image_io import MAX_BYTES
from fedface.web.app import MAX_UPLOAD
from fedface.web.server import listen, port_of
from fedface.web.upload import Reader

SEARCH = "fedface web search"  # the name of the thread


def query(photo: str) -> dict[str, object]:
    """A search of three faces."""
    return {"photo": photo, "face": 0, "side": 8, "method": "fading", "faces": 3, "seed": 0}


def test_a_port_in_use_is_one_sentence() -> None:
    """And port 0 finds another one."""
    with listen(0) as first, listen(0) as second:
        assert port_of(first) != port_of(second)
        with pytest.raises(ConfigError, match=f"port {port_of(first)} cannot be used"):
            listen(port_of(first))


def test_the_socket_listens_on_the_loopback_only() -> None:
    """Every other address of this machine is refused."""
    with listen(0) as listening:
        assert listening.getsockname()[0] == "127.0.0.1"
        assert listening.family == socket.AF_INET
        socket.create_connection(("127.0.0.1", port_of(listening)), 5).close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port_of(listening)), 5)


def test_a_closed_page_ends_its_search(run_page: Run) -> None:
    """Eight steps of half a second are interrupted soon after the reader has gone."""
    running = run_page(FadingSearcher(pause=0.5), Reader(SIZE, lambda: Known(1)))
    with running.client() as client:
        photo = client.post("/photo", content=photo_bytes()).json()["photo"]
        with client.stream("POST", "/search", json=query(photo)) as stream:
            next(stream.iter_lines())
            assert SEARCH in threads()
        closed = time.monotonic()
        while SEARCH in threads():
            assert time.monotonic() - closed < 2
            time.sleep(0.05)


def threads() -> set[str]:
    """The names of this process's threads."""
    return {thread.name for thread in threading.enumerate()}


def test_a_crash_of_the_decoder_is_one_sentence_and_the_next_photo_is_read() -> None:
    """Photos are decoded in another process, so a hostile one ends only that process."""
    reader = Reader(SIZE, lambda: Known(1))
    try:
        reader.read(photo_bytes())
        assert reader.child is not None
        os.kill(reader.child, signal.SIGKILL)
        time.sleep(0.1)
        assert reader.read(photo_bytes()).found == 1
    finally:
        reader.close()
    assert reader.child is None


@contextmanager
def web_command() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`fedface web` in a process of its own, and the port that it prints."""
    command = [sys.executable, "-m", "fedface.cli", "web"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        found = re.fullmatch(r"open http://127\.0\.0\.1:(\d+)/\n", started.stdout.readline())
        assert found is not None
        yield started, int(found[1])
    finally:
        started.kill()
        started.wait()


def check_end(started: subprocess.Popen[str]) -> None:
    """The command ends with code 0, without errors, and says what it kept."""
    rest, errors = started.communicate(timeout=30)
    assert started.returncode == 0 and errors == ""
    assert rest.endswith("stopped; photos and generated faces were in memory only\n")


@pytest.mark.slow
def test_the_command_listens_on_a_free_port_of_this_computer_and_ends_with_ctrl_c() -> None:
    """It prints the address, answers there, and reports that it deleted everything."""
    with web_command() as (started, port):
        running = Running(port)
        with running.client() as client:
            assert client.get("/about").json()["size"] == 32
            assert client.get("/", headers={"host": "evil.example"}).status_code == 403
        assert listening_at(running.port) == {"0100007F"}
        started.send_signal(signal.SIGINT)
        check_end(started)


def test_ctrl_c_during_a_search_prints_no_traceback() -> None:
    """The stream of the search ends before the server cuts it off."""
    with web_command() as (started, port):
        with Running(port).client() as client:
            photo = client.post("/synthetic", json={}).json()["photo"]
            asked = query(photo) | {"method": "pulse", "faces": 8}
            with client.stream("POST", "/search", json=asked) as stream:
                next(stream.iter_lines())
                started.send_signal(signal.SIGINT)
                check_end(started)


class FindsNothing:
    """A detector that takes its time."""

    name = "slow"

    def __init__(self, pause: float) -> None:
        self.pause, self.calls = pause, 0

    def find(self, pixels: object) -> list[Face]:
        self.calls += 1
        time.sleep(self.pause)
        return []


@pytest.mark.slow
def test_a_photo_without_a_face_tells_how_far_it_is_and_stops_when_it_is_left(run_page: Run) -> None:
    """Four rotations; once the page has gone, those that remain are skipped, so that the next photo need not wait."""
    slow = FindsNothing(0.5)
    running = run_page(FadingSearcher(), Reader(SIZE, lambda: slow))
    seen, stopped = set(), threading.Event()

    def watch() -> None:
        with running.client() as other:
            while not stopped.is_set():
                seen.add(tuple(other.get("/detection").json().values()))
                time.sleep(0.1)

    thread = threading.Thread(target=watch)
    thread.start()
    with running.client() as client:
        assert client.post("/photo", content=photo_bytes()).json()["found"] == 0
    stopped.set()
    thread.join()
    assert {(1, 4), (2, 4), (3, 4)} <= seen and slow.calls == 4
    with running.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/photo", content=photo_bytes(), timeout=0.7)
    with running.client() as client:
        assert client.post("/photo", content=photo_bytes()).json()["found"] == 0
    assert slow.calls in (4 + 2 + 4, 4 + 1 + 4)


def test_the_page_takes_what_the_command_line_takes() -> None:
    """One size limit for a photo."""
    assert MAX_UPLOAD == MAX_BYTES


def listening_at(port: int) -> set[str]:
    """The IPv4 addresses, in the kernel's hexadecimal, that listen on a port; none over IPv6."""
    if not os.path.exists("/proc/net/tcp"):
        return {"0100007F"}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        if os.path.exists(table):
            rows = [line.split() for line in open(table, encoding="ascii").readlines()[1:]]
            found |= {
                row[1].split(":")[0] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")
            }
    return found


@pytest.mark.parametrize("option", ["--checkpoint", "--detector"])
def test_a_missing_file_ends_the_command_before_the_page_is_served(option: str, tmp_path: Path) -> None:
    """Its name is in the error."""
    with pytest.raises(FedfaceError, match="nowhere"):
        get_command(app)(["web", option, str(tmp_path / "nowhere")], standalone_mode=False)
