"""A published run folder contains nothing private, and a run whose audits fail keeps its results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import caller
from tiny import started, tiny_experiment, tiny_file

from fedface.audits.gradient_inversion import NoDefense, candidate_identification
from fedface.coordinator.run import check_same
from fedface.coordinator.run_folder import new_folder
from fedface.errors import RunError
from fedface.experiment import devices_folder
from fedface.reports import run_record


@pytest.fixture
def fedface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """The command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return caller(monkeypatch, capsys)


def test_a_run_that_fails_in_its_audits_keeps_its_rounds(
    fedface,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,  # type: ignore[no-untyped-def]
) -> None:
    """Out of memory: one sentence; a report of what is there; resumed with smaller audits, no device is asked again.

    Its folder then holds neither a key nor a path of this machine, and says everywhere that the attack was shortened.
    """
    tiny = tiny_file(tmp_path)
    tiny.write_text(tiny.read_text().replace("{kind: plain}", "{kind: homomorphic}"))

    def too_large(*_: object, **__: object) -> None:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4131840000 bytes."
        )

    with monkeypatch.context() as patch:
        patch.setattr("fedface.coordinator.run.audit_update_leakage", too_large)
        result = fedface("run", "tiny.yaml")
    assert result.code == 2 and "All 2 rounds are stored" in result.err and "Traceback" not in result.err
    assert "attack.candidates" in result.err

    assert fedface("report", "runs/tiny").code == 0
    page = Path("runs/tiny/report-so-far.html").read_text()
    assert "the audits of this run have not ended" in page and "no attack was run" in page
    assert not Path("runs/tiny/run.json").exists()

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a device was asked again")

    with monkeypatch.context() as patch:
        patch.setattr("fedface.device.client.prepare_round", asked)
        result = fedface(
            "run", "tiny.yaml", "--resume", "--set", "attack.candidates=3", "--set", "probe.per_group=3"
        )
    assert result.code == 0, result.err
    record = run_record.read(Path("runs/tiny"))
    assert record.attacks[0].identification.candidates == 3
    shortened = "shortened to 2 of 300 iterations: what it did not recover is not evidence"
    assert shortened in " ".join(result.out.split())
    assert any(shortened in note for note in record.notes)
    for name in ("report.html", "model-card.md"):
        assert shortened in " ".join(Path("runs/tiny", name).read_text().split())

    private = devices_folder(Path("runs/tiny"))
    assert (private / "device-00" / "sum.key").exists() and private.stat().st_mode & 0o777 == 0o700
    for path in Path("runs/tiny").rglob("*"):
        assert path.suffix not in (".key", ".sqlite"), path
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    assert (
        json.loads(Path("runs/tiny/run.json").read_text())["experiment"]["base"] == "rounds/000.safetensors"
    )
    assert fedface("plan", "runs/tiny/experiment.yaml").code == 0


def test_only_audits_may_change_on_resume(tmp_path: Path) -> None:
    """Neither training nor privacy nor the weights of the base; a base that has gone is not needed any more."""
    experiment = tiny_experiment(tmp_path)
    folder = started(experiment, tmp_path / "run")
    for changes in ({"attack.candidates": "7"}, {"probe.per_group": "3"}, {"question": "Another?"}):
        check_same(tiny_experiment(tmp_path, changes), folder)
    for changes in ({"training.rounds": "3"}, {"privacy.epsilon": "3"}, {"devices.photos_per_device": "30"}):
        with pytest.raises(RunError, match="another experiment"):
            check_same(tiny_experiment(tmp_path, changes), folder)
    check_same(replace(experiment, base=tmp_path / "gone.safetensors"), folder)
    with pytest.raises(RunError, match="another experiment"):
        check_same(replace(experiment, base=None), folder)


def test_keys_of_an_earlier_run_are_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/tiny.private").mkdir(parents=True)
    assert new_folder("tiny", None) == Path("runs/tiny-2")
    with pytest.raises(RunError, match="belongs to an earlier run"):
        new_folder("tiny", Path("runs/tiny"))


def test_identification_needs_no_memory_for_all_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed a few trials at a time, it names the same candidates; gradients are never all in memory."""
    photos = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    calls = 0

    def gradient(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return images.flatten()

    def rate() -> tuple[float, int]:
        rng = torch.Generator().manual_seed(2)
        found = candidate_identification(gradient, photos, NoDefense(), trials=12, generator=rng)
        return found.rate.estimate, found.rate.count

    whole = rate()
    assert whole == (1.0, 12)
    monkeypatch.setattr("fedface.audits.gradient_inversion._NUMBERS_AT_ONCE", 3 * 48)
    calls = 0
    assert rate() == whole and calls == 1 + 12 + 4 * 40
