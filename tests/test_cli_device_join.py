"""`fedface device join` against a server of this process: what it trusts, asks, writes, and how it goes on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click import termui
from command_line import Result, caller
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fake_programs import fake_programs
from fake_server import OPERATOR, PUBLIC, TOKEN, FakeServer, running
from tiny import tiny_experiment, tiny_gan

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.cli.server_certificates import make_certificates, read_certificate
from fedface.coordinator.model_ranking import ranking_plan
from fedface.coordinator.requests import run_plan
from fedface.device.config import DeviceConfig, read_device_config
from fedface.device.device import admitted_plans
from fedface.experiment import for_ranking
from fedface.messages.invite import Invite
from fedface.messages.run_plan import RunPlan
from fedface.privacy.policy import DevicePolicy
from fedface.privacy.spending import fits_alone

QUESTIONS = 6  # photos, name, budget, hours, evaluation, the run


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """Two rounds and two evaluations, encrypted, under epsilon 8 at delta 1e-3."""
    changes = {
        "aggregation.kind": "homomorphic",
        "evaluation": "{epsilon_fraction: 0.3, holdout_fraction: 0.5}",
    }
    return run_plan(tiny_experiment(tmp_path_factory.mktemp("recipe"), changes))


@pytest.fixture
def server(certificates: Path, plan: RunPlan) -> Iterator[FakeServer]:
    """It runs until the end of the test."""
    with running(FakeServer(certificates, plan.signed(OPERATOR))) as fake:
        yield fake


@pytest.fixture
def invite(server: FakeServer, plan: RunPlan) -> Invite:
    """Of that server."""
    return server.invite(plan.signed(OPERATOR).hash)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The owner's home with a folder of photos, and a systemctl that notes its calls."""
    (tmp_path / "Pictures").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv(
        "PATH", f"{fake_programs(tmp_path / 'bin', 'systemctl')}{os.pathsep}{os.environ['PATH']}"
    )
    return tmp_path


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Call `fedface device ...` in this process."""
    return caller(monkeypatch, capsys, "device")


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Type these answers on a terminal; the questions appear in the returned list. An exception is raised."""

    def typed(*answers: str | type[BaseException]) -> list[str]:
        left, questions = list(answers), list[str]()

        def prompt(text: str = "") -> str:
            questions.append(text)
            one = left.pop(0)
            if isinstance(one, str):
                return one
            raise one

        monkeypatch.setattr(termui, "visible_prompt_func", prompt)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        return questions

    return typed


def test_an_invitation_becomes_a_device_with_the_least_policy(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, plan: RunPlan
) -> None:
    """Nothing is asked with --yes; the file reads back as what was decided, and the plan is admitted."""
    result = fedface("join", invite.code(), "--yes")
    assert result.code == 0, result.err
    folder = home / "fedface"
    config = read_device_config(folder / "device.yaml")
    policy = DevicePolicy(
        max_epsilon=config.policy.max_epsilon,
        delta=1e-6,
        unit="photo",
        objectives=("generator",),
        evaluation=True,
        protocols=("homomorphic",),
        min_cohort_size=2,
    )
    assert config == DeviceConfig(
        name="kitchen",
        photos=home / "Pictures",
        state=folder / "state",
        certificate=folder / "ca.crt",
        node_key=folder / "node",
        server=invite.address,
        operator=PUBLIC.hex(),
        policy=policy,
    )
    assert fits_alone(plan.releases.event(), "photo", policy.budgets[0])
    plans = admitted_plans(config)
    assert plans is not None and plans.read() == {invite.plan.hex(): plan}
    assert server.enrolled[TOKEN.hex()].startswith("ecdsa-sha2-nistp384 ")
    assert read_certificate(folder / "ca.crt") == read_certificate_of(server)
    assert [
        path.name for path in folder.rglob("*") if path.stat().st_mode & 0o077 and path.name != "lock"
    ] == []
    assert "# What this device may reveal about your photos" in (folder / "device.yaml").read_text()


def read_certificate_of(server: FakeServer) -> object:
    from cryptography import x509

    return x509.load_pem_x509_certificate(server.authority)


def test_the_run_is_shown_with_its_cost_before_anything_is_asked(  # type: ignore[no-untyped-def]
    fedface, invite: Invite, home: Path, answer, server: FakeServer
) -> None:
    """What is trained, how often, how sums are protected, and epsilon with delta, unit and bounds."""
    answer(KeyboardInterrupt)
    shown = " ".join(fedface("join", invite.code()).out.split())
    for words in (
        "tiny: Does a small run end?",
        "2 rounds of 2 steps",
        "2 sets of metrics",
        "numbers with noise that this device adds; masked and encrypted, so that the server sees only sums of at least "
        "2 devices",
        "at delta 1e-6 per photo, for the whole run",
        "(between ",
    ):
        assert words in shown, shown


def test_the_owner_is_asked_again_after_an_impossible_answer(  # type: ignore[no-untyped-def]
    fedface, invite: Invite, home: Path, answer
) -> None:
    """A folder that is not there, a budget that the run does not fit, an hour that does not exist."""
    other = home / "Familie Grün"
    other.mkdir()
    questions = answer(
        "~/nowhere", "~/Familie Grün", 'Küche "oben"', "lots", "0.5", "40", "25:00-07:00", "22:00-07:00,12:00-13:00",
        "n", "y", "n",
    )  # fmt: skip
    result = fedface("join", invite.code())
    assert result.code == 0, (result.out, result.err)
    assert len(questions) == QUESTIONS + 5
    assert f"there is no folder {home / 'nowhere'}" in result.out
    assert "a budget is a number above 0" in result.out and "would refuse it" in result.out
    assert 'hours must be written like "22:00-07:00"' in result.out
    config = read_device_config(home / "fedface" / "device.yaml")
    assert (config.name, config.photos) == ('Küche "oben"', other)
    assert (config.policy.max_epsilon, config.policy.evaluation) == (40, False)
    assert config.policy.hours == ("22:00-07:00", "12:00-13:00")


@pytest.mark.parametrize("question", range(QUESTIONS))
def test_an_interrupt_at_a_question_registers_nothing_and_the_same_command_goes_on(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, answer, question: int
) -> None:
    """Ctrl-C, or the end of the input."""
    answers = ["", "", "", "", "y", "y", "n"]
    answer(*answers[:question], KeyboardInterrupt if question % 2 else EOFError)
    result = fedface("join", invite.code())
    assert result.code == 1 and "The same command goes on" in result.err and "Traceback" not in result.err
    assert server.enrolled == {} and not (home / "fedface" / "device.yaml").exists()
    answer(*answers)
    assert fedface("join", invite.code()).code == 0


@pytest.mark.parametrize("path", ["/join/ca.crt", "/join/plans/", "/join/enrol"])
def test_a_server_that_is_silent_in_a_step_costs_a_repetition(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, path: str
) -> None:
    """Even if it has registered the device and its answer is lost: the key stays the same."""
    server.silent_at = path
    assert "cannot be reached" in fedface("join", invite.code(), "--yes").err
    registered = dict(server.enrolled)
    assert bool(registered) == (path == "/join/enrol")
    server.silent_at = ""
    assert fedface("join", invite.code(), "--yes").code == 0
    assert registered.items() <= server.enrolled.items()


def test_a_server_that_is_not_there_is_named(fedface, server: FakeServer, invite: Invite, home: Path) -> None:  # type: ignore[no-untyped-def]
    gone = replace(invite, address="localhost:1")
    assert fedface("join", gone.code(), "--yes").sentence.startswith("localhost:1 cannot be reached (")


def test_another_authority_is_not_trusted(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    """Somebody between device and server with certificates of their own learns nothing."""
    make_certificates(tmp_path / "others", ["localhost"])
    server.use(tmp_path / "others")
    server.authority = (tmp_path / "others" / "ca.crt").read_bytes()
    result = fedface("join", invite.code(), "--yes")
    assert "is not the server of this invitation" in result.sentence
    assert server.requests == ["/join/ca.crt"]
    assert not (home / "fedface" / "ca.crt").exists()


def test_the_right_certificate_from_another_server_is_not_enough(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    """The authority's certificate is public: whoever shows it must also prove to be signed by it."""
    make_certificates(tmp_path / "others", ["localhost"])
    server.use(tmp_path / "others")
    assert "does not prove that it is the server" in fedface("join", invite.code(), "--yes").err
    assert server.requests == ["/join/ca.crt"]


def test_nothing_beside_the_checked_certificate_is_trusted(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    """A second certificate in the same file is dropped."""
    make_certificates(tmp_path / "others", ["localhost"])
    server.authority += (tmp_path / "others" / "ca.crt").read_bytes()
    result = fedface("join", invite.code(), "--yes")
    stored = home / "fedface" / "ca.crt"
    assert result.code == 2 or stored.read_text().count("BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: b"", "has no run plan"),
        (lambda plan: plan.signed(Ed25519PrivateKey.generate()).to_bytes(), "is not signed by the operator"),
        (lambda plan: replace(plan, question="Another?").signed(OPERATOR).to_bytes(), "instead of"),
        (lambda plan: b"\xff" * 5_000_000, "expected a run plan"),
    ],
)
def test_another_plan_is_not_admitted(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, plan: RunPlan,
    change: Callable[[RunPlan], bytes], words: str,
) -> None:  # fmt: skip
    """Missing, signed by somebody else, another one of the operator's, or endless."""
    server.plan = change(plan)
    result = fedface("join", invite.code(), "--yes")
    assert result.code == 2 and words in result.err
    assert "/join/enrol" not in server.requests and not (home / "fedface" / "device.yaml").exists()


def test_a_used_token_is_refused_with_the_servers_sentence(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:
    server.enrolled[TOKEN.hex()] = "another key"
    result = fedface("join", invite.code(), "--yes")
    assert result.code == 2
    assert "does not register this device: this invitation was used by another device" in result.err
    assert not (home / "fedface" / "device.yaml").exists()


@pytest.mark.parametrize("name", ["", "a\nmax_epsilon: 900", "x" * 81])
def test_a_name_from_the_server_cannot_change_the_file(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, name: str
) -> None:
    """It is one printable line, or the device has not joined."""
    server.name = name
    assert (
        "name must be a text of 1 to 80 printable characters" in fedface("join", invite.code(), "--yes").err
    )
    assert not (home / "fedface" / "device.yaml").exists()


def test_a_finished_folder_is_never_joined_again(
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:  # type: ignore[no-untyped-def]
    """Its file may have been edited."""
    assert fedface("join", invite.code(), "--yes").code == 0
    before = {path: path.read_bytes() for path in (home / "fedface").rglob("*") if path.is_file()}
    assert "has joined already" in fedface("join", invite.code(), "--yes").sentence
    assert before == {path: path.read_bytes() for path in (home / "fedface").rglob("*") if path.is_file()}


def test_a_folder_with_other_files_is_refused(
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:  # type: ignore[no-untyped-def]
    (home / "Pictures" / "cat.jpg").write_bytes(b"cat")
    result = fedface("join", invite.code(), home / "Pictures", "--yes")
    assert "Pictures: contains cat.jpg, and is not the folder of a device" in result.sentence
    assert [path.name for path in (home / "Pictures").iterdir()] == ["cat.jpg"] and server.requests == []


def test_a_folder_that_was_begun_with_another_server_is_refused(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:
    """Its key is not given to two servers."""
    server.silent_at = "/join/enrol"
    fedface("join", invite.code(), "--yes")
    server.silent_at = ""
    (home / "fedface" / "ca.crt").write_text("another")
    assert "another server" in fedface("join", invite.code(), "--yes").sentence


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--yes", "--photos", "~/nowhere"), "photos: there is no folder"),
        (("--yes", "--epsilon", "0.1"), "with a budget of 0.1 this device would refuse it"),
        (("--yes", "--hours", "at night"), "hours must be written like"),
        (("--yes", "--name", "a\tb"), "name must be a text"),
        ((), "there is no terminal to ask you on"),
    ],
)
def test_an_impossible_option_registers_nothing(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, words: tuple[str, ...], sentence: str
) -> None:
    result = fedface("join", invite.code(), *words)
    assert result.code == 2 and sentence in result.err and server.enrolled == {}


def test_an_owner_without_a_picture_folder_names_one(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:
    (home / "Pictures").rmdir()
    assert "there is no default" in fedface("join", invite.code(), "--yes").err


def test_a_run_without_noise_is_not_joined(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    plain = run_plan(tiny_experiment(tmp_path / "recipe", {"privacy": "{kind: no-privacy}"})).signed(OPERATOR)
    server.plan = plain.to_bytes()
    result = fedface("join", replace(invite, plan=bytes.fromhex(plain.hash)).code(), "--yes")
    assert result.code == 2 and "adds no noise" in result.err and server.enrolled == {}


def test_a_device_can_join_for_a_ranking_of_models(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    """Its owner sees how many models are measured and what that costs; nothing may be trained on these photos."""
    recipe = for_ranking(tiny_experiment(tmp_path / "recipe"))
    ranking = ranking_plan(recipe, [tiny_gan(), tiny_gan("other"), tiny_gan("third")]).signed(OPERATOR)
    server.plan, code = ranking.to_bytes(), replace(invite, plan=bytes.fromhex(ranking.hash)).code()
    joined = fedface("join", code, "--yes", "--no-service")
    shown = " ".join(joined.out.split())
    assert joined.code == 0 and "3 models are measured on your photos, to choose between them" in shown
    assert "Privacy cost" in shown and "at delta 1e-6 per photo, for the whole run" in shown
    policy = read_device_config(home / "fedface" / "device.yaml").policy
    assert (policy.objectives, policy.evaluation) == ((), True)
    (listed,) = json.loads(fedface("plans", "--json").out)
    assert (listed["run"], listed["fits"]) == ("tiny-ranking", True)


def test_only_an_owner_decides_to_trust_a_server_with_numbers_without_noise(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path, answer
) -> None:
    """--yes is not enough."""
    target = {"privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: central}"}
    trusting = run_plan(tiny_experiment(tmp_path / "recipe", target)).signed(OPERATOR)
    server.plan, code = trusting.to_bytes(), replace(invite, plan=bytes.fromhex(trusting.hash)).code()
    assert "trusts the server" in fedface("join", code, "--yes").err
    answer("", "", "", "", "n")
    assert "trusts the server" in fedface("join", code).err and server.enrolled == {}
    answer("", "", "", "", "y", "y", "n")
    assert fedface("join", code).code == 0
    policy = read_device_config(home / "fedface" / "device.yaml").policy
    assert (policy.trust_server, policy.unit, policy.protocols) == (True, "library", ("plain",))


def test_joining_a_run_with_distributed_noise_trusts_no_server_and_as_few_devices_as_it_needs(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, tmp_path: Path
) -> None:
    """Two of three: the owner reads it before joining, and the device file says it."""
    terms = {
        "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: distributed, "
        "honest_fraction: 0.67}",
        "aggregation": "{kind: masked, min_devices: 3, dropout_share: 0}",
        "devices": "{kind: synthetic-devices, light_fractions: [0.9, 0.5, 0.1], photos_per_device: 8}",
        "min_responses": "3",
    }
    plan = run_plan(tiny_experiment(tmp_path / "recipe", terms)).signed(OPERATOR)
    server.plan, code = plan.to_bytes(), replace(invite, plan=bytes.fromhex(plan.hash)).code()
    joined = fedface("join", code, "--yes", "--no-service")
    shown = " ".join(joined.out.split())
    assert (
        joined.code == 0 and "a share of the noise, of which 2 devices in each sum must add theirs" in shown
    )
    policy = read_device_config(home / "fedface" / "device.yaml").policy
    assert (policy.trust_server, policy.honest_fraction, policy.protocols) == (False, 0.67, ("masked",))
    (listed,) = json.loads(fedface("plans", "--json").out)
    assert listed["fits"] is True


def test_the_key_for_sums_follows_from_the_admitted_plan(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:
    """The join says how to get it."""
    assert "fedface device keygen" in fedface("join", invite.code(), "--yes").out
    key = home / "fedface" / "state" / "sum.key"
    assert fedface("keygen", key, "--device", home / "fedface" / "device.yaml").code == 0
    assert HomomorphicKeys.load(key).name


def test_a_device_starts_as_a_service_unless_its_owner_says_no(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path, answer
) -> None:
    """An interrupt at this question is a no: the device has joined."""
    calls = home / "bin" / "calls"
    answer("", "", "", "", "y", "y", KeyboardInterrupt)
    result = fedface("join", invite.code())
    assert result.code == 0 and "Start it: fedface device start" in result.out and not calls.exists()
    assert (
        fedface("join", invite.code(), home / "second", "--yes", "--no-service").code == 2
    )  # the token is used
    server.enrolled.clear()
    result = fedface("join", invite.code(), home / "second", "--yes")
    assert result.code == 0 and "this device runs now and after each login" in result.out
    assert "systemctl --user enable fedface-kitchen.service" in calls.read_text()


def test_a_system_without_services_still_joins(  # type: ignore[no-untyped-def]
    fedface, server: FakeServer, invite: Invite, home: Path
) -> None:
    """The way to start it without one is the last line."""
    fake_programs(home / "bin", "systemctl", fails=True)
    result = fedface("join", invite.code(), "--yes")
    assert (
        result.code == 0
        and "No service was installed: systemctl --user daemon-reload failed: no bus" in result.out
    )
    assert result.out.splitlines()[-1] == f"Start it: fedface device start {home / 'fedface' / 'device.yaml'}"
    assert not list((home / ".config").rglob("*.service"))
