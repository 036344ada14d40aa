"""Every training method end to end: from photos over encrypted sums to a report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny import tiny_way

from fedface import cli
from fedface.config import dump
from fedface.experiment import devices_folder
from fedface.measurements import Epsilon
from fedface.models.checkpoint import load_model, weights_hash
from fedface.privacy.ledger import Ledger
from fedface.reports import run_record


@pytest.mark.usefixtures("quick_charts")
@pytest.mark.parametrize("way", ["lora", "prior", "flow", "styles", "resolver"])
def test_a_run_of_each_method_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """One round under DP: recorded once on each device, applied, attacked with its own update, rendered."""
    recipe = tmp_path / "way.yaml"
    changes = {"aggregation": "{kind: homomorphic}", "name": way}
    recipe.write_text(dump(tiny_way(tmp_path, way, changes)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedface", "run", str(recipe)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    folder = tmp_path / "runs" / way
    record = run_record.read(folder)
    assert record.rounds[0].participants == ("device-00", "device-01") and len(record.rounds) == 1
    spent = record.rounds[0].epsilon
    assert isinstance(spent, Epsilon) and 7 < spent.upper <= 8
    for state in sorted(devices_folder(folder).iterdir()):
        assert len(Ledger.open(state / "ledger.sqlite").entries()) == 1
    model = load_model(folder / "rounds" / "001.safetensors")
    assert record.final_hash == weights_hash(*model.modules()) != record.base_hash
    unprotected, protected = (attack.identification for attack in record.attacks)
    assert unprotected.rate.estimate == 1.0 and protected.bound < 1.0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert record.final_hash in page
