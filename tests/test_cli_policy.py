"""`fedface policy check`: sentences, verdicts and exit codes; nothing on disk is changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import caller

from fedface.experiment import Experiment, read_experiment
from fedface.privacy.budget import format_upper_bound
from fedface.privacy.ledger import Ledger
from fedface.privacy.mechanism import GaussianSum
from fedface.privacy.participation_conditions import Power, SystemEnvironment

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "experiments" / "demo.yaml"

WILLING = """
max_epsilon: 8
delta: 1e-5
objectives: [generator]
protocols: [masked]
"""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Call `fedface policy check` in this process."""

    return caller(monkeypatch, capsys, "policy", "check")


@pytest.fixture
def willing(tmp_path: Path) -> Path:
    """A policy that allows exactly the demo."""
    path = tmp_path / "policy.yaml"
    path.write_text(WILLING)
    return path


def device_file(folder: Path, policy: str = WILLING) -> Path:
    """A device with photos and state in the file's folder."""
    path = folder / "device.yaml"
    (folder / "photos").mkdir(exist_ok=True)
    lines = "".join(f"  {line}\n" for line in policy.strip().splitlines())
    path.write_text(f"name: kitchen\nphotos: photos\nstate: state\npolicy:\n{lines}")
    return path


def spent_ledger(path: Path, recipe: Experiment, rounds: int) -> Path:
    """A ledger with some recorded rounds of a run."""
    plan = recipe.plan()
    database = Ledger.open(path)
    for round in range(rounds):
        database.record(plan.event(1), run="earlier", round=round, metadata=plan.metadata())
    return path


def test_a_policy_is_printed_in_sentences(check, willing: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Every epsilon has its delta, unit and period; a device file gives the same as its policy section."""
    result = check(willing)
    assert (result.code, result.err) == (0, "")
    assert "at most epsilon 8 at delta 1e-5 per photo for life" in result.out
    assert "updates may be sent masked, where 3 devices or more are summed" in result.out
    assert "no ledger yet: nothing is spent" in result.out
    device = check(device_file(tmp_path))
    assert device.code == 0
    assert device.out.splitlines()[1:] == result.out.splitlines()[1:]


def test_a_device_would_take_part_in_what_fits(check, willing: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = sorted(tmp_path.rglob("*"))
    result = check(willing, "--experiment", DEMO)
    assert result.code == 0
    assert 'training ("generator", 6 rounds, per photo): would take part' in result.out
    assert "enough for 6 of its rounds" in result.out
    assert result.out.splitlines()[0] == f"this device would take part in {DEMO}"
    assert "the experiment's guarantee" not in result.out  # at the same delta, for the same unit
    assert sorted(tmp_path.rglob("*")) == before  # no ledger and no folder was created


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("max_epsilon: 8", "max_epsilon: 4"), "is already spent"),
        (("[generator]", "[upsampler]"), 'this device allows upsampler'),
        (("[masked]", "[plain]"), 'requests updates as "masked"; this device allows plain'),
        (("[masked]", "[masked]\nmin_cohort_size: 50"), "only among 50 or more"),
        (("[masked]", "[masked]\nunit: occasion"), "guarantee is per photo; the owner of this device counts"),
        (("[masked]", "[masked]\nexpires: 2020-01-01"), "has ended (2020-01-01)"),
    ],
)  # fmt: skip
def test_a_device_would_refuse_with_the_reason(  # type: ignore[no-untyped-def]
    check, willing: Path, change: tuple[str, str], words: str
) -> None:
    """Exit code 1 is not an error but the answer."""
    willing.write_text(WILLING.replace(*change))
    result = check(willing, "--experiment", DEMO)
    assert result.code == 1 and result.err == ""
    first, training, *_ = result.out.splitlines()
    assert first.startswith(f"this device would refuse {DEMO}: ") and words in first
    assert training == '  training ("generator", 6 rounds, per photo): would refuse'
    priced = "requests epsilon at most" in result.out.partition(training)[2]
    assert priced == ("already spent" in words)  # a refusal independent of cost has no cost


def test_spent_epsilon_counts(check, willing: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A device file's own ledger is found; another can be given; neither is changed."""
    recipe = read_experiment(DEMO)
    device = device_file(tmp_path)
    own = spent_ledger(tmp_path / "state" / "ledger.sqlite", recipe, rounds=2)
    stored = own.read_bytes()
    for words in ((device,), (willing, "--ledger", own)):
        result = check(*words, "--experiment", DEMO, "--json")
        reported = json.loads(result.out)
        assert result.code == 1 and reported["would_take_part"] is False
        (price,) = reported["requests"][0]["prices"]
        assert price["limit"] == {"epsilon": 8.0, "delta": 1e-5, "unit": "photo", "days": None}
        assert price["spent"] == reported["spent"][0]["spent"] > 0
        assert price["requested"] < 8.0 < price["together"] < price["requested"] + price["spent"]
        assert price["rounds_that_fit"] == 0  # the filter has no room for a third release beside two
        assert reported["refusal"] == reported["requests"][0]["refusal"] and reported["together"] is None
    assert own.read_bytes() == stored


@pytest.mark.parametrize("gone", ["ledger", "ledger and head", "witness"])
@pytest.mark.parametrize("named", [False, True])
def test_a_missing_ledger_is_detected(  # type: ignore[no-untyped-def]
    check, tmp_path: Path, gone: str, named: bool
) -> None:
    """By its head, or by the witness in the device file: a lost ledger is not an unspent budget."""
    device = device_file(tmp_path)
    device.write_text(f"witness: {tmp_path / 'disk'}\n{device.read_text()}")
    own = tmp_path / "state" / "ledger.sqlite"
    Ledger.open(own, tmp_path / "disk").record(
        GaussianSum(sigma=6.0, clip_norm=1.0).event(), run="r", round=0
    )
    (witness,) = (tmp_path / "disk").iterdir()
    lost = {"ledger": [own], "ledger and head": [own, head_of(own)], "witness": [witness]}[gone]
    for path in lost:
        path.unlink()
    before = sorted(tmp_path.rglob("*"))
    result = check(device, "--experiment", DEMO, *(("--ledger", own) if named else ()))
    assert result.code == 2 and result.out == ""
    (sentence,) = filter(None, result.err.splitlines())
    assert ("is missing" if gone == "witness" else "has gone but") in sentence
    assert sorted(tmp_path.rglob("*")) == before


def head_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.head")


def test_a_missing_ledger_given_by_path_is_detected(check, willing: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """For a policy file, only its head can reveal it."""
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path).record(GaussianSum(sigma=6.0, clip_norm=1.0).event(), run="r", round=0)
    path.unlink()
    result = check(willing, "--ledger", path)
    assert result.code == 2 and result.out == "" and "has gone but" in result.err


def test_a_check_does_not_create_a_witness(check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Only the running device does."""
    device = device_file(tmp_path)
    spent_ledger(tmp_path / "state" / "ledger.sqlite", read_experiment(DEMO), rounds=1)
    device.write_text(f"witness: {tmp_path / 'disk'}\n{device.read_text()}")
    result = check(device)
    assert result.code == 0 and "spent according to" in result.out and not (tmp_path / "disk").exists()


def test_a_period_reports_how_many_rounds_fit(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """A run may pause and continue: the device takes part if one round fits."""
    willing.write_text(WILLING + "periods: [{days: 7, epsilon: 5.5}]\n")
    result = check(willing, "--experiment", DEMO, "--json")
    reported = json.loads(result.out)
    life, week = reported["requests"][0]["prices"]
    assert result.code == 0 and life["rounds_that_fit"] == 6
    assert week["limit"]["days"] == 7.0 and 0 < week["rounds_that_fit"] < 6


def test_evaluation_is_reported_separately(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """An experiment with evaluation has two requests; together they cost no more than the target."""
    asks = ("--experiment", DEMO, "--set", "evaluation={}")
    result = check(willing, *asks)
    assert result.code == 1
    assert 'training ("generator", 6 rounds, per photo): would take part' in result.out
    assert result.out.startswith(f"this device would refuse {DEMO}: this run requests evaluation metrics")
    assert "training and evaluation together" not in result.out
    willing.write_text(WILLING + "evaluation: true\n")
    result = check(willing, *asks)
    assert result.code == 0 and "training and evaluation together: fits" in result.out
    reported = json.loads(check(willing, *asks, "--json").out)
    whole = read_experiment(DEMO, changes={"evaluation": "{}"}).plan().epsilon()
    assert whole is not None and reported["together"]["price"]["requested"] == whole.upper <= 8.0
    parts = [request["prices"][0]["requested"] for request in reported["requests"]]
    assert max(parts) < whole.upper < sum(parts) and reported["together"]["refusal"] is None
    willing.write_text(WILLING.replace("max_epsilon: 8", "max_epsilon: 7.95") + "evaluation: true\n")
    result = check(willing, *asks)
    assert result.code == 1
    first = result.out.splitlines()[0]
    assert result.out.count("would take part") == 2 and "all requests together need epsilon at most" in first
    assert "training and evaluation together: would refuse" in result.out


def test_hours_and_power_are_printed_but_are_no_refusal(  # type: ignore[no-untyped-def]
    check, willing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions that do not hold now may hold later."""
    monkeypatch.setattr(SystemEnvironment, "power", lambda _: Power(on_ac=False, battery=0.4))
    willing.write_text(WILLING + "require_ac_power: true\n")
    result = check(willing, "--experiment", DEMO)
    assert result.code == 0
    assert "this device takes part only on mains" in result.out
    assert "not now: mains is not connected; the policy requires it (require_ac_power)" in result.out


def test_a_run_without_dp_has_no_finite_cost(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """JSON has no infinity."""
    result = check(willing, "--experiment", DEMO, "--set", "privacy={kind: no-privacy}", "--json")
    reported = json.loads(result.out)
    assert result.code == 1
    assert reported["requests"][0]["prices"] == []
    assert "epsilon infinite at every delta" in reported["requests"][0]["refusal"]
    willing.write_text(WILLING + "allow_no_dp: true\n")
    reported = json.loads(
        check(willing, "--experiment", DEMO, "--set", "privacy={kind: no-privacy}", "--json").out
    )
    assert reported["would_take_part"] and reported["requests"][0]["prices"][0]["requested"] is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("nowhere.yaml",), "no such file"),
        (("policy.yaml", "--experiment", "nowhere.yaml"), "no such file"),
        (("policy.yaml", "--ledger", "nowhere.sqlite"), "no ledger here"),
        (("policy.yaml", "--set", "privacy.epsilon=3"), "name one with --experiment"),
        (
            ("policy.yaml", "--experiment", str(ROOT / "experiments" / "adaptation.yaml")),
            "describes several runs",
        ),
        (("typo.yaml",), 'typo.yaml:2: max_epsilom: unknown key; did you mean "max_epsilon"?'),
        (("half.yaml",), "the key policy is missing"),
        (("policy.yaml", "--experiment", "half.yaml"), "this is a device file; an experiment file has"),
        ((str(DEMO),), "this is an experiment file; a policy file has max_epsilon and delta"),
        (("broken.yaml",), "broken.yaml:3: not valid YAML: while parsing a flow sequence, expected"),
        (("bytes.yaml",), "bytes.yaml: is not a text file"),
        ((".",), "is a folder"),
    ],
)
def test_errors_are_one_sentence_and_code_2(  # type: ignore[no-untyped-def]
    check, willing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text(WILLING.replace("max_epsilon", "max_epsilom"))
    (tmp_path / "half.yaml").write_text("name: kitchen\nphotos: photos\nstate: state\n")
    (tmp_path / "photos").mkdir()
    (tmp_path / "broken.yaml").write_text("max_epsilon: 8\nobjectives: [generator\ndelta: 1e-4\n")
    (tmp_path / "bytes.yaml").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    result = check(*words)
    assert result.code == 2 and result.out == ""
    assert len(result.err.splitlines()) == 1 and "?" not in re.sub(
        r'did you mean "[a-z_.]+"\?', "", result.err
    )
    assert result.err.startswith("fedface: ") and reason in result.err
    assert not (tmp_path / "nowhere.sqlite").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "exclude_folders: [Privat]",
            "policy.exclude_folders: there is no folder Privat in PHOTOS; did you mean Private?",
        ),
        ("exclude_folders: [Gone]", "policy.exclude_folders: there is no folder Gone in PHOTOS."),
        ("folders: [Private, Famly]", "policy.folders: there is no folder Famly in PHOTOS."),
    ],
)
def test_a_missing_folder_is_an_error(check, tmp_path: Path, line: str, words: str) -> None:  # type: ignore[no-untyped-def]
    """In a device file; a policy file has no photos."""
    device = device_file(tmp_path, f"{WILLING}{line}\n")
    (tmp_path / "photos" / "Private").mkdir()
    result = check(device)
    assert result.code == 2 and result.out == ""
    assert words.replace("PHOTOS", str(tmp_path / "photos")) in result.err
    (tmp_path / "policy.yaml").write_text(f"{WILLING}{line}\n")
    assert check(tmp_path / "policy.yaml").code == 0


def test_what_the_device_would_refuse_is_reported(check, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Missing photos, a state folder that others can read; a ledger that others can read is a warning."""
    device = device_file(tmp_path)
    own = spent_ledger(tmp_path / "state" / "ledger.sqlite", read_experiment(DEMO), rounds=1)
    own.chmod(0o644)
    warning = f"others could read {own}; run chmod 600 on it"
    assert json.loads(check(device, "--json").out)["warnings"] == [warning]
    own.chmod(0o644)
    result = check(device)
    assert result.code == 0 and f"warning: {warning}" in result.out
    own.parent.chmod(0o755)
    result = check(device)
    assert result.code == 2 and f"other users can read {own.parent}; run chmod 700 on it" in result.err
    own.parent.chmod(0o700)
    (tmp_path / "photos").rmdir()
    result = check(device)
    assert result.code == 2 and "photos: there is no folder" in result.err


def test_implausible_settings_are_warnings(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """They do not change the verdict."""
    willing.write_text(WILLING.replace("1e-5", "0.05") + "periods: [{days: 7, epsilon: 9}]\n")
    result = check(willing)
    assert result.code == 0
    assert (
        "warning: delta 0.05 is large" in result.out
        and "warning: epsilon 9 at delta 0.05 per photo" in result.out
    )


def test_an_expired_policy_is_reported(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """Exit code 1 only with an experiment."""
    willing.write_text(WILLING + "expires: 2020-01-01\n")
    result = check(willing)
    assert (
        result.code == 0
        and result.out.splitlines()[0] == "this policy ended on 2020-01-01; everything is refused"
    )
    assert check(willing, "--experiment", DEMO).code == 1
    assert (
        json.loads(check(willing, "--json").out)["ended"]
        == "this policy ended on 2020-01-01; everything is refused"
    )


def test_another_delta_than_the_experiments_is_reported(check, willing: Path) -> None:  # type: ignore[no-untyped-def]
    """The same noise has a higher epsilon at a smaller delta."""
    willing.write_text(WILLING.replace("1e-5", "1e-6"))
    result = check(willing, "--experiment", DEMO)
    assert result.code == 1
    assert (
        "read at this device's delta 1e-6, per photo; the experiment's guarantee is epsilon at most 8 at delta 1e-5, "
        "per photo, over everything"
    ) in result.out
    for line in result.out.splitlines():
        if "epsilon" in line and "allows" not in line:
            assert "delta" in line and ("at most" in line or "max_epsilon" in line)


def test_an_overspent_ledger_leaves_nothing(check, willing: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By how much, in text and in JSON."""
    willing.write_text(WILLING.replace("max_epsilon: 8", "max_epsilon: 0.5"))
    own = spent_ledger(tmp_path / "ledger.sqlite", read_experiment(DEMO), rounds=2)
    result = check(willing, "--ledger", own)
    spent = Ledger.open(own).spent(1e-5).upper
    over = format_upper_bound(spent - 0.5)
    sentence = f"nothing remains: everything will be refused; over by {over} at delta 1e-5 per photo"
    assert result.code == 0 and sentence in result.out.splitlines()
    assert json.loads(check(willing, "--ledger", own, "--json").out)["spent"][0]["exhausted"] == sentence


def test_the_readmes_command_is_answered_with_yes(check, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A first command that refuses the project's own demo teaches nothing."""
    monkeypatch.chdir(ROOT)
    line = re.search(
        r"fedface policy check (clients/policy\.example\.yaml .*)", (ROOT / "README.md").read_text()
    )
    assert line is not None
    said = check(*line[1].split())
    assert said.code == 0 and said.out.startswith("this device would take part in experiments/demo.yaml")
