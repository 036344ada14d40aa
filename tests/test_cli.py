"""The command line: what it prints, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import Said, caller
from png_files import write_png
from tiny import first_device, tiny_experiment, tiny_file, tiny_gan, train_task

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
    """Runs go to `runs/` there, indexes beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def fedface(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Call the command line in this process."""

    return caller(monkeypatch, capsys)


def sentence(said: Said) -> str:
    """The one line of an error of ours, after stages at most; anything else fails the test."""
    assert said.code == 2, (said.code, said.out, said.err)
    assert said.out == "" and "Traceback" not in said.err
    *stages, line = filter(None, said.err.splitlines())
    assert all(stage.endswith(" ...") for stage in stages)
    assert line.startswith("fedface: ")
    return line.removeprefix("fedface: ")


def test_help_names_every_command(fedface) -> None:  # type: ignore[no-untyped-def]
    """Also those of the parts."""
    said = fedface("--help")
    assert said.code == 0
    for command in (
        "run", "plan", "report", "compare", "rank-models", "evaluate", "upsample", "benchmark", "web", "photos",
        "pretrain", "weights", "device", "ledger", "policy",
    ):  # fmt: skip
        assert command in said.out


def test_an_unknown_command_or_option_is_code_2(fedface) -> None:  # type: ignore[no-untyped-def]
    """Typer's own words, no traceback."""
    for words in (["teach"], ["run"], ["run", "x.yaml", "--fast"], ["ledger", "show", "x", "--delta", "2"]):
        said = fedface(*words)
        assert said.code == 2 and "Traceback" not in said.err


def test_check_says_what_travels_bare_to_a_trusted_server(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    told = {
        "privacy": "{kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, trust: server}",
        "evaluation": "{metrics: {min_group_size: 2}}",
    }
    changes = [part for key, value in told.items() for part in ("--set", f"{key}={value}")]
    said = " ".join(fedface("plan", str(tiny_file(tmp_path)), *changes).out.split())
    assert "without noise until the server adds noise to their sum" in said
    assert (
        "no guarantee limits what the server can infer from its updates and metrics, which it sees without noise"
        in said
    )


def test_check_warns_of_noise_that_drowns_the_sum_of_few_devices(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Length sigma * sqrt(8,007) against two updates of length 1: some fifty times."""
    library = "privacy={kind: privacy-target, epsilon: 8, delta: 1e-3, unit: library, trust: server}"
    said = " ".join(fedface("plan", str(tiny_file(tmp_path)), "--set", library).out.split())
    sigma = tiny_experiment(tmp_path, {"privacy": library.partition("=")[2]}).plan().noise_multiplier
    assert (
        f"about {sigma * 8007**0.5 / 2:,.0f} times the largest possible L2 norm of the sum of 2 devices' updates"
        in said
    )
    assert "warning" not in fedface("plan", str(tiny_file(tmp_path))).out


def test_check_does_not_fill_a_terminal_with_a_line_for_each_of_many_devices(  # type: ignore[no-untyped-def]
    fedface, tmp_path: Path
) -> None:
    many = f"devices.light_fractions=[{', '.join(['0.5'] * 30)}]"
    said = fedface("plan", str(tiny_file(tmp_path)), "--set", many).out
    assert said.count("synthetic faces") == 12 and "and 18 more" in said and "devices: 30" in said


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_key_is_said_with_its_line(fedface, tmp_path: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    """File, line, key, neighbour."""
    path = tiny_file(tmp_path)
    path.write_text(path.read_text().replace("epsilon:", "epsilom:"))
    said = sentence(fedface(command, str(path)))
    assert said.startswith(f'{path}:4: privacy.epsilom: unknown key; did you mean "epsilon"?')


def test_mistakes_in_options_are_sentences(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A missing file, --set without a value, a value that is no YAML, --photos where none are wanted."""
    path = str(tiny_file(tmp_path))
    assert 'no such file; did you mean "tiny.yaml"' in sentence(fedface("plan", str(tmp_path / "tony.yaml")))
    assert "--set expects KEY=VALUE" in sentence(fedface("plan", path, "--set", "seed"))
    assert "--set seed: not valid YAML" in sentence(fedface("plan", path, "--set", "seed=["))
    assert "seed: must be at least 0" in sentence(fedface("plan", path, "--set", "seed=-1"))
    assert "--photos goes with labelled" in sentence(fedface("plan", path, "--photos", "."))
    assert "no such checkpoint" in sentence(fedface("plan", path, "--set", "base=none.safetensors"))
    assert "does not go with faces of 16 pixels" in sentence(
        fedface("plan", path, "--set", "upsampling.downscale={kind: area, factor: 3}")
    )
    assert not Path("runs").exists()


def test_check_prints_the_plan(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Question, rounds, q, sigma, epsilon with delta, unit and bounds, what travels up and down."""
    path = tiny_file(tmp_path)
    plan = tiny_experiment(tmp_path).plan()
    bounds = plan.epsilon()
    said = fedface("plan", str(path))
    assert said.code == 0 and bounds is not None
    for words in (
        "Does a small run end?",
        "2 rounds of 2 private steps",
        "sampling rate 0.5",
        f"noise multiplier {plan.noise_multiplier:.4f}",
        "epsilon at most 8 at delta 0.001 per photo",
        f"(between {bounds.lower:.3f} and {bounds.upper:.3f})",
        "devices: 2",
        "device-01: synthetic faces, 10% light skin",
        "8,007 weight changes per device and round, plain",
    ):
        assert words in said.out


def test_check_as_json_says_the_same_in_numbers(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """And the bytes are those of a payload made for the purpose."""
    told = json.loads(fedface("plan", str(tiny_file(tmp_path)), "--json").out)
    plan = tiny_experiment(tmp_path).plan()
    assert told["noise_multiplier"] == plan.noise_multiplier
    assert told["schedule"]["sampling_rate"] == 0.5 and told["privacy"]["delta"] == 1e-3
    assert told["epsilon"]["upper"] <= 8
    assert told["weights"] == len(flatten_parameters(*tiny_gan().modules()))
    assert told["bytes_down_per_device_and_round"] == 4 * told["weights"]
    assert told["bytes_up_per_device_and_round"] > 4 * told["weights"]


def test_check_without_a_promise_says_so(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In capitals, and as null."""
    words = ("plan", str(tiny_file(tmp_path)), "--set", "privacy={kind: no-privacy}")
    assert "NO PRIVACY GUARANTEE" in fedface(*words).out
    assert json.loads(fedface(*words, "--json").out)["epsilon"] is None


def test_there_is_nothing_to_resume_where_nothing_was_begun(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Neither by name nor by folder; and a finished run is no unfinished one."""
    path = str(tiny_file(tmp_path))
    assert "no unfinished run of tiny in runs" in sentence(fedface("run", path, "--resume"))
    assert "there is no run to resume here" in sentence(
        fedface("run", path, "--resume", "--out", "elsewhere")
    )
    initialize_run(tiny_experiment(tmp_path), Path("runs/tiny"))
    Path("runs/tiny/run.json").write_text("{}")
    assert "no unfinished run of tiny" in sentence(fedface("run", path, "--resume"))


def test_another_experiments_run_is_not_resumed(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`tiny-large` is not a later run of `tiny`, and a changed recipe is not the one that was begun."""
    path = str(tiny_file(tmp_path))
    initialize_run(tiny_experiment(tmp_path, {"name": "tiny-large"}), Path("runs/tiny-large"))
    assert "no unfinished run of tiny" in sentence(fedface("run", path, "--resume"))
    with locked_folder(Path("runs/tiny"), "run"):
        initialize_run(tiny_experiment(tmp_path), Path("runs/tiny"))
    said = fedface("run", path, "--resume", "--set", "seed=3")
    assert said.code == 2 and "started with another experiment" in said.err and "Traceback" not in said.err


def test_a_begun_folder_is_not_begun_again(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Nor continued by mistake: that takes --resume. A file is no folder."""
    path = str(tiny_file(tmp_path))
    with locked_folder(Path("mine"), "run"):
        initialize_run(tiny_experiment(tmp_path), Path("mine"))
    assert "a run was started here; continue it with --resume" in sentence(
        fedface("run", path, "--out", "mine")
    )
    Path("file").write_text("")
    assert "cannot be the folder of a run" in sentence(fedface("run", path, "--out", "file"))


def test_two_processes_do_not_work_on_one_run(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The second is told."""
    path = str(tiny_file(tmp_path))
    with locked_folder(Path("mine"), "run"):
        assert "another process is working on this run" in sentence(fedface("run", path, "--out", "mine"))


def test_real_devices_are_not_waited_for_in_this_process(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A sentence with the way to go."""
    said = sentence(
        fedface("run", str(tiny_file(tmp_path)), "--set", "devices={kind: remote-devices, count: 2}")
    )
    assert "remote devices" in said and "server/README.md" in said
    assert not Path("runs").exists()


def test_photos_and_reports_that_are_not_there_are_sentences(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Of every command that reads one."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.jpg").write_text("no picture")
    assert "there is no folder" in sentence(fedface("photos", "scan", "nowhere"))
    assert "no files in" in sentence(fedface("photos", "scan", "empty"))
    assert "is not a folder" in sentence(fedface("photos", "scan", "words.jpg"))
    assert "no record of a run here" in sentence(fedface("report", "empty"))
    for photo in ("nowhere.jpg", "words.jpg"):
        said = fedface("upsample", photo)
        assert said.code == 2 and "fedface: " in said.err and "Traceback" not in said.err
    assert fedface("upsample", "words.jpg", "--factor", "0").code == 2
    said = fedface("upsample", "words.jpg", "--checkpoint", "words.jpg")
    assert "not a readable safetensors file" in sentence(said)
    assert 'did you mean "pulse"?' in sentence(fedface("upsample", "words.jpg", "--method", "pulze"))
    assert "--factor must divide the 32 pixels" in sentence(fedface("upsample", "words.jpg", "--factor", "5"))
    assert "no picture in this folder" in sentence(fedface("upsample", "empty", "--method", "nearest"))
    assert "no such folder of labelled photos" in sentence(fedface("benchmark", "--photos", "nowhere"))
    said = fedface("benchmark", "--photos", "empty", "--light-fraction", "0.5")
    assert "--light-fraction applies to synthetic faces" in sentence(said)


def test_a_folder_of_small_faces_becomes_sheets_and_a_record(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Two sheets; the second time nothing is done again; another seed is refused in the same folder."""
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
    told = json.loads(fedface(*words).out)
    assert [entry["sheets"][0]["answers"][0]["fits"] for entry in told] == [[True], [True]]
    assert sorted(path.name for path in Path("sheets").iterdir()) == ["0.png.png", "1.png.png", "faces.json"]
    made = Path("sheets/0.png.png").stat().st_mtime_ns
    assert fedface(*words).code == 0 and Path("sheets/0.png.png").stat().st_mtime_ns == made
    assert "other photos or settings" in sentence(fedface(*words, "--seed", "1"))
    before = Path("in/0.png").read_bytes()
    assert "is not overwritten" in sentence(fedface("upsample", "in/0.png", "--out", "in/0.png"))
    assert Path("in/0.png").read_bytes() == before


def test_methods_are_compared_and_the_baselines_are_there(fedface) -> None:  # type: ignore[no-untyped-def]
    """One network beside nearest and bicubic; the table, the record and two pictures lie in the folder."""
    said = fedface(
        "benchmark", "--method", "super-resolution", "--per-group", "9", "--out", "compared", "--json"
    )
    told = json.loads(said.out)
    assert [each["method"] for each in told["methods"]] == ["super-resolution", "nearest", "bicubic"]
    names = ["benchmark.json", "benchmark.md", "by-group.png", "faces.png", "lock"]
    assert sorted(path.name for path in Path("compared").iterdir()) == names


def test_a_key_is_made_once_and_for_hidden_sums_only(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Mode 0600; never over another key; never where sums are open."""
    path = tiny_file(tmp_path)
    assert "there is no key to share" in sentence(fedface("device", "keygen", "k", "--experiment", str(path)))
    path.write_text(path.read_text().replace("{kind: plain}", "{kind: homomorphic}"))
    said = fedface("device", "keygen", "keys/sum.key", "--experiment", str(path))
    assert said.code == 0 and "not to the server" in said.out
    assert Path("keys/sum.key").stat().st_mode & 0o777 == 0o600
    assert "never overwritten" in sentence(
        fedface("device", "keygen", "keys/sum.key", "--experiment", str(path))
    )


def test_a_ledger_is_shown_with_its_price(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Entries, epsilon with delta and unit; in JSON the same."""
    experiment = tiny_experiment(tmp_path)
    device = first_device(experiment, tmp_path / "devices")
    handle_task(train_task(experiment, tiny_gan()), device)
    said = fedface("ledger", "show", str(device.ledger_path), "--delta", "0.001")
    assert said.code == 0 and "tiny" in said.out and "at delta 0.001, per photo" in said.out
    told = json.loads(fedface("ledger", "show", str(device.ledger_path), "--delta", "0.001", "--json").out)
    assert [(entry["run"], entry["round"], entry["attempt"]) for entry in told["entries"]] == [("tiny", 1, 1)]
    assert told["delta"] == 0.001 and told["unit"] == "photo"


def test_a_ledger_that_is_none_is_said(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Missing, or a file of something else, which is left as it is."""
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
    said = fedface(
        "weights", "sample", tmp_path / "gan.safetensors", "--out", tmp_path / "sheet.png", "--tones"
    )
    assert said.code == 0 and "Monk 10:" in said.out and "darker half of the Monk scale" in said.out
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"


def test_a_file_that_cannot_be_written_is_a_sentence(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """In a folder that is not there, over a folder, among the parts of a file."""
    tiny = tiny_file(tmp_path)
    assert "No such file" in sentence(fedface("photos", "synthesize", "none/sheet.png"))
    assert "Is a directory" in sentence(fedface("photos", "synthesize", str(tmp_path)))
    assert "Not a directory" in sentence(fedface("report", str(tiny)))


def test_a_networks_settings_that_cannot_be_are_sentences(fedface) -> None:  # type: ignore[no-untyped-def]
    """With the option's name, for both kinds of networks."""
    for file in ("x.onnx", "x.pt"):
        words = ("evaluate", "--network", file)
        said = sentence(fedface(*words, "--network-std", "0", "0", "0"))
        assert said.startswith("--network-std must be three numbers > 0")
        assert sentence(fedface(*words, "--network-size", "1")).startswith(
            "--network-size must lie in [8, 2048]"
        )
        said = sentence(fedface(*words, "--network-mean", "nan", "0", "0"))
        assert said.startswith("--network-mean must be three finite numbers")


def test_training_does_not_begin_for_a_file_that_cannot_be_written(  # type: ignore[no-untyped-def]
    fedface, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as --out is said before the first step of each recipe."""

    def begun(*words: object, **more: object) -> None:
        raise ZeroDivisionError

    for command in ("gan", "flow", "encoder"):
        monkeypatch.setattr(f"fedface.training.pretrain_{command}.pretrain_{command}", begun)
        assert "is a folder" in sentence(fedface("pretrain", command, "--out", "."))
        with pytest.raises(ZeroDivisionError):
            fedface("pretrain", command, "--out", "a.safetensors")


def test_an_encoder_is_not_begun_for_a_generator_with_classes(fedface, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Such a generator needs a label beside the latent, which no encoder names."""
    config = StyleGAN2Config(size=8, latent_width=4, style_width=4, channel_base=32, channel_max=4, classes=2)
    save_model(
        tmp_path / "a.safetensors", build_model(GeneratorArchitecture(generator=config), torch.Generator())
    )
    said = sentence(
        fedface("pretrain", "encoder", "--checkpoint", "a.safetensors", "--step-fraction", "0.0001")
    )
    assert said.startswith("a.safetensors: expected a generator without classes, got one with 2")
    assert not Path("encoder32.safetensors").exists()


def test_escape_codes_do_not_reach_the_terminal_in_an_error(fedface) -> None:  # type: ignore[no-untyped-def]
    """Of our own errors and of the system's; brackets stay brackets."""
    assert sentence(fedface("plan", "[/red]\x1b[2J.yaml")) == "[/red]?[2J.yaml: no such file"
    assert sentence(fedface("photos", "synthesize", "[/red]\x1b[2J/a.png")).startswith(
        "[/red]?[2J/a.png: No such file"
    )


def test_an_interrupt_says_what_is_kept(fedface, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """Ctrl-C: code 130 and the way on."""

    def interrupted(*words: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedface.experiment.read_experiment", interrupted)
    said = fedface("run", "x.yaml")
    assert said.code == 130 and "Continue a run with --resume" in said.err


def test_what_is_not_our_error_is_a_traceback(fedface, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A bug is not hidden behind a sentence."""

    def broken(*words: object, **more: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("fedface.experiment.read_experiment", broken)
    with pytest.raises(ZeroDivisionError):
        fedface("run", "x.yaml")
    assert not issubclass(ZeroDivisionError, FedfaceError)


def test_the_installed_command_ends_with_code_2_and_one_line(tmp_path: Path) -> None:
    """The same through a process of its own: nothing else is printed while importing."""
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
    """Options are declared without importing torch, so what they repeat is compared here."""
    assert METHOD_NAMES == tuple(METHODS)
    pretrain = sys.modules["fedface.cli.pretrain"]
    for config in (GanPretrainConfig(), FlowPretrainConfig()):
        assert (config.seed, config.light_fraction) == (pretrain.SEED, pretrain.LIGHT_FRACTION)
    assert EncoderPretrainConfig().seed == UpsamplerPretrainConfig().seed == pretrain.SEED
    assert FlowPretrainConfig().flow.size == pretrain.SIZE
