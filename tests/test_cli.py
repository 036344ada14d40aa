"""The command line: its output, and that every user error is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Result, caller
from png_files import write_png
from tiny import first_device, tiny_experiment, tiny_file, tiny_gan, train_task

from fedface.aggregation.homomorphic import HomomorphicKeys
from fedface.atomic_io import locked_folder
from fedface.cli.options import METHOD_NAMES
from fedface.coordinator.run import initialize_run
from fedface.device.client import handle_task
from fedface.errors import FedfaceError
from fedface.models.checkpoint import flatten_parameters, save_model
from fedface.models.model import GeneratorArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2Config
from fedface.training.pretrain_encoder import EncoderPretrainConfig
from fedface.training.pretrain_flow import FlowPretrainConfig
from fedface.training.pretrain_gan import GanPretrainConfig
from fedface.training.pretrain_upsampler import UpsamplerPretrainConfig
from fedface.upsampling.methods import METHODS

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to `runs/` in an empty folder, and so do indexes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Call the command line in this process."""

    return caller(monkeypatch, capsys)


def sentence(result: Result) -> str:
    """The one-line error, after stages at most; anything else fails the test."""
    assert result.code == 2, (result.code, result.out, result.err)
    assert result.out == "" and "Traceback" not in result.err
    *stages, line = filter(None, result.err.splitlines())
    assert all(stage.endswith(" ...") for stage in stages)
    assert line.startswith("fedface: ")
    return line.removeprefix("fedface: ")


def test_help_names_every_command(fedface) -> None:  # type: ignore[no-untyped-def]
    """Including those of command groups."""
    result = fedface("--help")
    assert result.code == 0
    for command in (
        "run", "plan", "report", "compare", "rank-models", "evaluate", "upsample", "benchmark", "web", "photos",
        "pretrain", "weights", "device", "ledger", "policy",
    ):  # fmt: skip
        assert command in result.out


def test_an_unknown_command_or_option_is_code_2(fedface) -> None:  # type: ignore[no-untyped-def]
    """Typer's own message, no traceback."""
    for words in (["teach"], ["run"], ["run", "x.yaml", "--fast"], ["ledger", "show", "x", "--delta", "2"]):
        result = fedface(*words)
        assert result.code == 2 and "Traceback" not in result.err


def test_plan_states_what_a_trusted_server_sees_without_noise(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    reported = {
        "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: central}",
        "evaluation": "{metrics: {min_group_size: 2}}",
    }
    changes = [part for key, value in reported.items() for part in ("--set", f"{key}={value}")]
    result = " ".join(fedface("plan", str(tiny_file(tmp_path)), *changes).out.split())
    assert "without noise until the server adds noise to their sum" in result
    assert (
        "no guarantee limits what the server can infer from its updates and metrics, which it sees without noise"
        in result
    )


def test_plan_warns_of_noise_that_dominates_the_sum_of_few_devices(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Norm sigma * sqrt(8,007) against two updates of norm 1: a factor of about fifty."""
    library = "privacy={kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, noise: central}"
    result = " ".join(fedface("plan", str(tiny_file(tmp_path)), "--set", library).out.split())
    sigma = tiny_experiment(tmp_path, {"privacy": library.partition("=")[2]}).plan().noise_multiplier
    assert (
        f"about {sigma * 8007**0.5 / 2:,.0f} times the largest possible L2 norm of the sum of 2 devices' updates"
        in result
    )
    assert "warning: the noise" not in fedface("plan", str(tiny_file(tmp_path))).out


def test_plan_summarises_many_devices(  # type: ignore[no-untyped-def]
    fedface, tmp_path: Path
) -> None:
    many = f"devices.light_fractions=[{', '.join(['0.5'] * 30)}]"
    result = fedface("plan", str(tiny_file(tmp_path)), "--set", many).out
    assert result.count("synthetic faces") == 12 and "and 18 more" in result and "devices: 30" in result


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_key_is_reported_with_its_line(fedface, tmp_path: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    """File, line, key, suggestion."""
    path = tiny_file(tmp_path)
    path.write_text(path.read_text().replace("epsilon:", "epsilom:"))
    result = sentence(fedface(command, str(path)))
    assert result.startswith(f'{path}:4: privacy.epsilom: unknown key; did you mean "epsilon"?')


def test_errors_in_options_are_one_sentence(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A missing file, --set without a value, a value that is not YAML, --photos where none are needed."""
    path = str(tiny_file(tmp_path))
    assert 'no such file; did you mean "tiny.yaml"' in sentence(fedface("plan", str(tmp_path / "tony.yaml")))
    assert "--set expects KEY=VALUE" in sentence(fedface("plan", path, "--set", "seed"))
    assert "--set seed: not valid YAML" in sentence(fedface("plan", path, "--set", "seed=["))
    assert "seed: must be at least 0" in sentence(fedface("plan", path, "--set", "seed=-1"))
    assert "--photos needs labelled" in sentence(fedface("plan", path, "--photos", "."))
    assert "no such checkpoint" in sentence(fedface("plan", path, "--set", "base=none.safetensors"))
    assert "does not support faces of 16 pixels" in sentence(
        fedface("plan", path, "--set", "upsampling.downscale={kind: area, factor: 3}")
    )
    assert not Path("runs").exists()


def test_plan_prints_privacy_noise_and_traffic(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Question, rounds, sampling rate, noise, epsilon with delta, unit and bounds, traffic up and down."""
    path = tiny_file(tmp_path)
    plan = tiny_experiment(tmp_path).plan()
    bounds = plan.epsilon()
    result = fedface("plan", str(path))
    assert result.code == 0 and bounds is not None
    for words in (
        "Does a small run end?",
        "2 rounds of 2 private steps",
        "sampling rate 0.5",
        f"noise multiplier {plan.noise_multiplier:g}",
        "epsilon at most 8 at delta 0.001 per photo",
        f"({bounds.bounds()})",
        "devices: 2",
        "device-01: synthetic faces, 10% light skin",
        "8,007 weight changes per device and round, plain",
    ):
        assert words in result.out


def test_plan_as_json_has_the_same_numbers(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """And the bytes are those of a payload built for the purpose."""
    reported = json.loads(fedface("plan", str(tiny_file(tmp_path)), "--json").out)
    plan = tiny_experiment(tmp_path).plan()
    assert reported["noise_multiplier"] == plan.noise_multiplier
    assert reported["schedule"]["sampling_rate"] == 0.5 and reported["privacy"]["delta"] == 1e-3
    assert reported["epsilon"]["upper"] <= 8
    assert reported["weights"] == len(flatten_parameters(*tiny_gan().modules()))
    assert reported["bytes_down_per_device_and_round"] == 4 * reported["weights"]
    assert reported["bytes_up_per_device_and_round"] > 4 * reported["weights"]


def test_plan_without_dp_states_it(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In capitals, and as null."""
    words = ("plan", str(tiny_file(tmp_path)), "--set", "privacy={kind: no-privacy}")
    assert "NO PRIVACY GUARANTEE" in fedface(*words).out
    assert json.loads(fedface(*words, "--json").out)["epsilon"] is None


def test_resuming_needs_an_unfinished_run(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Neither by name nor by folder; and a finished run cannot be resumed."""
    path = str(tiny_file(tmp_path))
    assert "no unfinished run of tiny in runs" in sentence(fedface("run", path, "--resume"))
    assert "there is no run to resume here" in sentence(
        fedface("run", path, "--resume", "--out", "elsewhere")
    )
    initialize_run(tiny_experiment(tmp_path), Path("runs/tiny"))
    Path("runs/tiny/run.json").write_text("{}")
    assert "no unfinished run of tiny" in sentence(fedface("run", path, "--resume"))


def test_another_experiments_run_is_not_resumed(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`tiny-large` is not a later run of `tiny`, and a changed experiment is not the one that was started."""
    path = str(tiny_file(tmp_path))
    initialize_run(tiny_experiment(tmp_path, {"name": "tiny-large"}), Path("runs/tiny-large"))
    assert "no unfinished run of tiny" in sentence(fedface("run", path, "--resume"))
    with locked_folder(Path("runs/tiny"), "run"):
        initialize_run(tiny_experiment(tmp_path), Path("runs/tiny"))
    result = fedface("run", path, "--resume", "--set", "seed=3")
    assert (
        result.code == 2 and "started with another experiment" in result.err and "Traceback" not in result.err
    )


def test_a_started_folder_is_not_started_again(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nor continued without --resume. A file is not a folder."""
    path = str(tiny_file(tmp_path))
    with locked_folder(Path("mine"), "run"):
        initialize_run(tiny_experiment(tmp_path), Path("mine"))
    assert "a run was started here; continue it with --resume" in sentence(
        fedface("run", path, "--out", "mine")
    )
    Path("file").write_text("")
    assert "cannot be the folder of a run" in sentence(fedface("run", path, "--out", "file"))


def test_two_processes_do_not_work_on_one_run(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The second gets an error."""
    path = str(tiny_file(tmp_path))
    with locked_folder(Path("mine"), "run"):
        assert "another process is working on this run" in sentence(fedface("run", path, "--out", "mine"))


def test_remote_devices_need_a_server(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The error explains how to start one."""
    result = sentence(
        fedface("run", str(tiny_file(tmp_path)), "--set", "devices={kind: remote-devices, at_least: 2}")
    )
    assert "remote devices" in result and "fedface server run" in result
    assert not Path("runs").exists()


def test_missing_photos_and_reports_are_one_sentence(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of every command that reads one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jpg").write_text("no picture")
    missing = fedface("photos", "scan", "nowhere")
    assert "there is no folder" in sentence(missing) and "files read" not in missing.err
    assert "no files in" in sentence(fedface("photos", "scan", "empty"))
    assert "is not a folder" in sentence(fedface("photos", "scan", "words.jpg"))
    assert "no record of a run here" in sentence(fedface("report", "empty"))
    for photo in ("nowhere.jpg", "words.jpg"):
        result = fedface("upsample", photo)
        assert result.code == 2 and "fedface: " in result.err and "Traceback" not in result.err
    assert fedface("upsample", "words.jpg", "--factor", "0").code == 2
    result = fedface("upsample", "words.jpg", "--checkpoint", "words.jpg")
    assert "not a readable safetensors file" in sentence(result)
    assert 'did you mean "pulse"?' in sentence(fedface("upsample", "words.jpg", "--method", "pulze"))
    assert "--factor must divide the 32 pixels" in sentence(fedface("upsample", "words.jpg", "--factor", "5"))
    assert "no picture in this folder" in sentence(fedface("upsample", "empty", "--method", "nearest"))
    assert "no such folder of labelled photos" in sentence(fedface("benchmark", "--photos", "nowhere"))
    result = fedface("benchmark", "--photos", "empty", "--light-fraction", "0.5")
    assert "--light-fraction applies to synthetic faces" in sentence(result)


def test_a_folder_of_small_faces_becomes_sheets_and_a_record(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two sheets; the second time nothing is done; another seed is refused in the same folder."""
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_png(tmp_path / "in" / f"{number}.png", np.full((8, 8, 3), 90 * number + 60, dtype=np.uint8))
    words = (
        "upsample",
        "in",
        "--method",
        "nearest",
        "--method",
        "super-resolution",
        "--out",
        "sheets",
        "--json",
    )
    reported = json.loads(fedface(*words).out)
    assert [entry["sheets"][0]["outputs"][0]["fits"] for entry in reported] == [[True], [True]]
    assert sorted(path.name for path in Path("sheets").iterdir()) == ["0.png.png", "1.png.png", "faces.json"]
    generated = Path("sheets/0.png.png").stat().st_mtime_ns
    assert fedface(*words).code == 0 and Path("sheets/0.png.png").stat().st_mtime_ns == generated
    assert "other photos or settings" in sentence(fedface(*words, "--seed", "1"))
    before = Path("in/0.png").read_bytes()
    assert "will not be replaced" in sentence(fedface("upsample", "in/0.png", "--out", "in/0.png"))
    assert Path("in/0.png").read_bytes() == before


def test_a_benchmark_includes_the_baselines(fedface) -> None:  # type: ignore[no-untyped-def]
    """One network with nearest and bicubic; the table, the record and two pictures are in the folder."""
    result = fedface(
        "benchmark", "--method", "super-resolution", "--per-group", "9", "--out", "compared", "--json"
    )
    reported = json.loads(result.out)
    assert [each["method"] for each in reported["methods"]] == ["super-resolution", "nearest", "bicubic"]
    names = ["benchmark.json", "benchmark.md", "by-group.png", "faces.png", "lock"]
    assert sorted(path.name for path in Path("compared").iterdir()) == names


def test_a_key_is_generated_once_and_only_for_encrypted_sums(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Mode 0600; never over another key; never for plain sums."""
    path = tiny_file(tmp_path)
    assert "there is no key to share" in sentence(fedface("device", "keygen", "k", "--experiment", str(path)))
    path.write_text(path.read_text().replace("{kind: plain}", "{kind: homomorphic}"))
    result = fedface("device", "keygen", "keys/sum.key", "--experiment", str(path))
    assert result.code == 0 and "not to the server" in result.out
    assert Path("keys/sum.key").stat().st_mode & 0o777 == 0o600
    assert "never overwritten" in sentence(
        fedface("device", "keygen", "keys/sum.key", "--experiment", str(path))
    )


def test_with_a_public_key_two_files_are_written_of_which_one_decrypts(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """One for this device, one for the others, with one name."""
    path = tiny_file(tmp_path)
    path.write_text(path.read_text().replace("{kind: plain}", "{kind: homomorphic, public_key: true}"))
    result = fedface("device", "keygen", "sum.key", "--experiment", str(path))
    assert (
        result.code == 0 and "wrote sum.key.public: copy it to each other device as its sum.key" in result.out
    )
    own, others = (HomomorphicKeys.load(Path(name)) for name in ("sum.key", "sum.key.public"))
    assert own.name == others.name and own.secret and not others.secret


def test_a_ledger_is_shown_with_its_cost(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Entries, epsilon with delta and unit; the same in JSON."""
    experiment = tiny_experiment(tmp_path)
    device = first_device(experiment, tmp_path / "devices")
    handle_task(train_task(experiment, tiny_gan()), device)
    result = fedface("ledger", "show", str(device.ledger_path), "--delta", "0.001")
    assert result.code == 0 and "tiny" in result.out and "at delta 0.001, per photo" in result.out
    reported = json.loads(
        fedface("ledger", "show", str(device.ledger_path), "--delta", "0.001", "--json").out
    )
    assert [(entry["run"], entry["round"], entry["attempt"]) for entry in reported["entries"]] == [
        ("tiny", 1, 1)
    ]
    assert reported["delta"] == 0.001 and reported["unit"] == "photo"


def test_a_file_that_is_not_a_ledger_is_refused(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Missing, or another file, which is not changed."""
    assert "no ledger here" in sentence(fedface("ledger", "show", "none.sqlite"))
    (tmp_path / "small.sqlite").write_text("x")
    assert "no ledger here" in sentence(fedface("ledger", "show", "small.sqlite"))
    assert (tmp_path / "small.sqlite").read_text() == "x" and not (tmp_path / "small.sqlite.head").exists()
    (tmp_path / "words.sqlite").write_text("once upon a time, " * 100)
    assert "damaged or locked" in sentence(fedface("ledger", "show", "words.sqlite"))
    assert (tmp_path / "words.sqlite").read_text().startswith("once upon a time")


def test_a_checkpoint_is_shown_as_a_sheet(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A PNG of samples."""
    save_model(tmp_path / "gan.safetensors", tiny_gan())
    result = fedface(
        "weights", "sample", tmp_path / "gan.safetensors", "--out", tmp_path / "sheet.png", "--tones"
    )
    assert result.code == 0 and "Monk 10:" in result.out and "darker half of the Monk scale" in result.out
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_that_cannot_be_written_is_one_sentence(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In a missing folder, over a folder, below a file."""
    tiny = tiny_file(tmp_path)
    assert "No such file" in sentence(fedface("photos", "synthesize", "none/sheet.png"))
    assert "Is a directory" in sentence(fedface("photos", "synthesize", str(tmp_path)))
    assert "Not a directory" in sentence(fedface("report", str(tiny)))


def test_invalid_network_settings_are_one_sentence(fedface) -> None:  # type: ignore[no-untyped-def]
    """With the option's name, for both kinds of networks."""
    for file in ("x.onnx", "x.pt"):
        words = ("evaluate", "--network", file)
        result = sentence(fedface(*words, "--network-std", "0", "0", "0"))
        assert result.startswith("--network-std must be three numbers > 0")
        assert sentence(fedface(*words, "--network-size", "1")).startswith(
            "--network-size must lie in [8, 2048]"
        )
        result = sentence(fedface(*words, "--network-mean", "nan", "0", "0"))
        assert result.startswith("--network-mean must be three finite numbers")


def test_training_does_not_begin_for_a_file_that_cannot_be_written(  # type: ignore[no-untyped-def]
    fedface, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as --out is refused before the first step."""

    def begun(*words: object, **more: object) -> None:
        raise ZeroDivisionError

    for command in ("gan", "flow", "encoder"):
        monkeypatch.setattr(f"fedface.training.pretrain_{command}.pretrain_{command}", begun)
        assert "is a folder" in sentence(fedface("pretrain", command, "--out", "."))
        with pytest.raises(ZeroDivisionError):
            fedface("pretrain", command, "--out", "a.safetensors")


def test_an_encoder_is_not_trained_for_a_generator_with_classes(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Such a generator needs a label with the latent, which an encoder does not give."""
    config = StyleGAN2Config(size=8, latent_width=4, style_width=4, channel_base=32, channel_max=4, classes=2)
    save_model(
        tmp_path / "a.safetensors", build_model(GeneratorArchitecture(generator=config), torch.Generator())
    )
    result = sentence(
        fedface("pretrain", "encoder", "--checkpoint", "a.safetensors", "--step-fraction", "0.0001")
    )
    assert result.startswith("a.safetensors: expected a StyleGAN2 generator without classes, got ")
    assert not Path("encoder32.safetensors").exists()


def test_escape_codes_do_not_reach_the_terminal_in_an_error(fedface) -> None:  # type: ignore[no-untyped-def]
    """In errors of fedface and of the system; brackets remain brackets."""
    assert sentence(fedface("plan", "[/red]\x1b[2J.yaml")) == "[/red]?[2J.yaml: no such file"
    assert sentence(fedface("photos", "synthesize", "[/red]\x1b[2J/a.png")).startswith(
        "[/red]?[2J/a.png: No such file"
    )


def test_an_interrupt_states_what_is_saved(fedface, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C: code 130 and how to continue."""

    def interrupted(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedface.experiment.read_experiment", interrupted)
    result = fedface("run", "x.yaml")
    assert result.code == 130 and "Continue a run with --resume" in result.err


def test_a_bug_is_a_traceback(fedface, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """It is not hidden behind a sentence."""

    def broken(*words: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedface.experiment.read_experiment", broken)
    with pytest.raises(ZeroDivisionError):
        fedface("run", "x.yaml")
    assert not issubclass(ZeroDivisionError, FedfaceError)


def test_the_installed_command_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    """In a process of its own: nothing else is printed while importing."""
    done = subprocess.run(
        [sys.executable, "-c", "from fedface.cli import main; main()", "plan", str(tmp_path / "none.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip().splitlines() == [f"fedface: {tmp_path / 'none.yaml'}: no such file"]


def test_the_declared_defaults_and_names_are_the_librarys() -> None:
    """Options are declared without importing torch, so their defaults are compared here."""
    assert METHOD_NAMES == tuple(METHODS)
    pretrain = sys.modules["fedface.cli.pretrain"]
    for config in (GanPretrainConfig(), FlowPretrainConfig()):
        assert (config.seed, config.light_fraction) == (pretrain.SEED, pretrain.LIGHT_FRACTION)
    assert EncoderPretrainConfig().seed == UpsamplerPretrainConfig().seed == pretrain.SEED
    assert FlowPretrainConfig().flow.size == pretrain.SIZE
