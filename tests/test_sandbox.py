"""A process that has restricted itself reads and writes only what it was left, and has no network but one port."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedface import sandbox
from fedface.sandbox import Restrictions, restrict

ROOT = Path(__file__).resolve().parents[1]
TRY = """
import json, os, socket, subprocess, sys
import fedface
from pathlib import Path
from fedface.sandbox import restrict
here, port = Path(sys.argv[1]), int(sys.argv[2])
own = Path(fedface.__file__).parents[1]
sys.path[:] = [place for place in sys.path if Path(place).resolve() != own]  # as after `pip install --editable`
given = restrict(read=[here / "photos"], write=[here / "state"], connect=[port])
photo, diary, note = here / "photos" / "a", here / "diary", here / "state" / "note"
reader = [sys.executable, "-c", f"print(open({str(diary)!r}).read())"]
attempts = {
    "read a photo": photo.read_text,
    "change a photo": lambda: photo.write_text("x"),
    "delete a photo": photo.unlink,
    "add a photo": lambda: (here / "photos" / "b").write_text("x"),
    "write the state": lambda: note.write_text("x"),
    "replace the state": lambda: note.rename(here / "state" / "other"),
    "read another file": diary.read_text,
    "list another folder": lambda: list(here.iterdir()),
    "read it in a child": lambda: subprocess.run(reader, capture_output=True).returncode and diary.read_text(),
    "connect to the port": lambda: socket.create_connection(("127.0.0.1", port), 5).close(),
    "connect to another port": lambda: socket.create_connection(("127.0.0.1", port - 1), 5),
    "listen": lambda: socket.create_server(("127.0.0.1", 0)),
    "use UDP": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "use a local socket": lambda: socket.socket(socket.AF_UNIX),
    "use SCTP": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132),
    "import more of fedface": lambda: __import__("fedface.number_format"),
    "import and compute": lambda: __import__("numpy").linalg.inv([[2.0]]),
}
allowed = []
for name, attempt in attempts.items():
    try:
        attempt()
        allowed.append(name)
    except PermissionError:
        pass
    except OSError as error:
        assert name == "connect to another port", error
print(json.dumps([given.enforced, given.missing, allowed]))
"""


@pytest.mark.skipif(
    platform.machine() not in sandbox.ARCHITECTURES or sys.platform != "linux",
    reason="only Linux lets a process without root give up files and sockets",
)
def test_a_restricted_process_has_only_what_it_was_left(tmp_path: Path) -> None:
    """Also its children; in a fresh process, since nothing gives a right back."""
    if ctypes.CDLL(None).syscall(sandbox.CREATE_RULESET, None, 0, 1) < 4:
        pytest.skip("this kernel has no Landlock for TCP (Linux 6.7)")
    for name in ("photos", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos" / "a").write_text("a photo")
    (tmp_path / "diary").write_text("a secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-c", TRY, tmp_path, str(server.getsockname()[1])], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, timeout=60,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    enforced, missing, allowed = json.loads(done.stdout)
    assert enforced == ["new privileges", "files outside its own", "TCP connections", "UDP and other sockets"]
    assert missing == []
    assert allowed == [
        "read a photo", "write the state", "replace the state", "connect to the port", "import more of fedface",
        "import and compute"
    ]  # fmt: skip
    assert (tmp_path / "photos" / "a").read_text() == "a photo"


def test_other_systems_say_what_they_do_not_enforce(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have nothing that a process without root can use."""
    monkeypatch.setattr(sys, "platform", "darwin")
    given = restrict(read=[], write=[], connect=[1])
    assert given == Restrictions(
        enforced=(),
        missing=("new privileges", "files outside its own", "TCP connections", "UDP and other sockets"),
    )
