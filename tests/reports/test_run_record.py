"""The JSON record of a run: a round trip is exact, and everything invalid is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fedface.codec import CodecError, dumps, loads
from fedface.errors import RunError
from fedface.measurements import Epsilon, Interval, NotMeasured
from fedface.privacy.plan import make_plan
from fedface.privacy.privacy_target import NoPrivacy
from fedface.reports import run_record
from fedface.reports.run_record import PictureRecord, RunRecord


def test_a_record_is_equal_after_a_json_round_trip(record: RunRecord) -> None:
    assert loads(RunRecord, dumps(record)) == record


def test_a_record_without_dp_or_audits_is_equal_after_a_round_trip(record: RunRecord) -> None:
    reduced = replace(
        record,
        plan=make_plan(NoPrivacy(), record.plan.schedule),
        planned_epsilon=NotMeasured(not_measured="no noise"),
        bias_before=NotMeasured(not_measured="no probe"),
        rounds=(),
        attacks=(),
    )
    assert loads(RunRecord, dumps(reduced)) == reduced


def test_a_record_is_equal_after_writing_and_reading(record: RunRecord, tmp_path: Path) -> None:
    run_record.write(record, tmp_path)
    assert run_record.read(tmp_path) == record
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_nan_is_never_written(record: RunRecord) -> None:
    broken = replace(record, experiment={"rate": math.nan})
    with pytest.raises(ValueError, match="experiment.rate: must be finite"):
        dumps(broken)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_nan_is_never_read(record: RunRecord, text: str) -> None:
    changed = dumps(record).replace('"clip_norm": 1.0', f'"clip_norm": {text}')
    with pytest.raises(CodecError, match="finite"):
        loads(RunRecord, changed)


@pytest.mark.parametrize(
    "values", [(1.0, math.nan, 2.0, 3), (math.inf, 1.0, 2.0, 3), (1.0, 2.0, 1.0, 3), (1.0, 1.0, 1.0, 0)]
)
def test_an_interval_is_finite_ordered_and_counted(values: tuple[float, float, float, int]) -> None:
    with pytest.raises(ValueError, match=r"finite|low must be at most high|count must be >= 1"):
        Interval(*values)


def test_an_unknown_key_is_refused_with_its_path(record: RunRecord) -> None:
    plain = json.loads(dumps(record))
    plain["rounds"][2]["colour"] = "red"
    with pytest.raises(CodecError, match=r"rounds\.2\.colour: unknown key"):
        loads(RunRecord, json.dumps(plain))


def test_a_missing_key_is_refused_with_its_path(record: RunRecord) -> None:
    plain = json.loads(dumps(record))
    del plain["planned_epsilon"]["delta"]
    with pytest.raises(CodecError):
        loads(RunRecord, json.dumps(plain))


def test_text_instead_of_a_number_is_refused_with_its_path(record: RunRecord) -> None:
    plain = json.loads(dumps(record))
    plain["rounds"][0]["bytes_up"] = "many"
    with pytest.raises(CodecError, match=r'rounds\.0\.bytes_up: expected a whole number, got "many"'):
        loads(RunRecord, json.dumps(plain))


def test_a_value_out_of_bounds_is_refused_with_its_path(record: RunRecord) -> None:
    plain = json.loads(dumps(record))
    plain["planned_epsilon"]["delta"] = 1.5
    with pytest.raises(CodecError, match=r"planned_epsilon.delta: must lie in \(0, 1\), got 1.5"):
        loads(RunRecord, json.dumps(plain))


def test_a_key_given_twice_is_refused(record: RunRecord) -> None:
    with pytest.raises(CodecError, match="name: expected each key once"):
        loads(RunRecord, dumps(record).replace("{", '{"name": "twice",', 1))


def test_another_version_is_refused(record: RunRecord) -> None:
    with pytest.raises(CodecError, match="expected version 2, got 1"):
        loads(RunRecord, dumps(record).replace('"version": 2', '"version": 1'))


def test_an_epsilon_above_its_upper_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="ordered"):
        Epsilon(lower=1.0, estimate=3.0, upper=2.0, delta=1e-5, unit="photo")


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hosts.png", "run.json", ".png"])
def test_a_picture_outside_the_folder_is_refused(file: str) -> None:
    with pytest.raises(ValueError, match="file must be a plain name"):
        PictureRecord(file=file, section="more", caption="", alt="")


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected the folder of a finished run"):
        run_record.read(tmp_path)
