"""`fedface weights`: what it prints about checkpoints, and how it refuses."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_gan

from fedface import cli
from fedface.errors import WeightsError
from fedface.models.checkpoint import load_model, save_model, weights_hash
from fedface.models.model import GeneratorArchitecture, build_model
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Call `fedface weights` in this process, in an empty folder: (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedface", "weights", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return call


def checkpoint(path: Path) -> StyleGAN2:
    """A state dict as torch.save writes it."""
    config = StyleGAN2Config(
        size=16, latent_width=6, style_width=5, mapping_layers=2, channel_base=128, channel_max=8
    )
    generator = StyleGAN2(config, torch.Generator().manual_seed(1))
    torch.save({"G_ema": generator.state_dict(), "step": 9}, path)
    return generator


def test_an_imported_file_is_described_and_saved(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Kind, size, weights, layers, form, hash, what was ignored, and an image; the result is a fedface model."""
    generator = checkpoint(tmp_path / "a.pt")
    code, out, _ = weights("import", "a.pt", "--out", "new/a.safetensors", "--sheet", "a.png")
    assert code == 0
    count = sum(part.numel() for part in generator.parameters())
    for words in (
        "found: stylegan2-ada state dict",
        "a generator alone, 16 x 16 pixels",
        f"generator: StyleGAN2, {count:,} weights",
        "mapping layers 2",
        "architecture skip",
        f"hash: {weights_hash(generator)}",
        "discriminator: none",
        "ignored: step",
        "does not say whether activations are clamped",
        "wrote new/a.safetensors",
        "open a.png",
    ):
        assert words in out, words
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    stored = load_model(tmp_path / "new/a.safetensors")
    assert isinstance(stored.architecture, GeneratorArchitecture) and weights_hash(
        *stored.modules()
    ) == weights_hash(generator)
    assert stored.notes["file"] == "a.pt" and len(stored.notes["sha256"]) == 64
    reported = json.loads(weights("import", "a.pt", "--out", "b.safetensors", "--json")[1])
    assert reported["hash"] == weights_hash(generator) and reported["ignored"] == ["step"]
    assert reported["networks"][0]["weights"] == count and reported["size"] == 16


def test_fedface_checkpoints_are_shown_hashed_and_sampled(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Each also as JSON; the hash covers weights, not notes; a seed gives one image."""
    gan = tiny_gan()
    save_model(tmp_path / "a.safetensors", gan)
    expected = weights_hash(*gan.modules())
    code, out, _ = weights("show", "a.safetensors")
    assert (
        code == 0
        and f"hash: {expected}" in out
        and "discriminator: Discriminator" in out
        and "16 x 16 pixels" in out
    )
    assert json.loads(weights("show", "a.safetensors", "--json")[1])["hash"] == expected
    assert weights("hash", "a.safetensors")[1].strip() == expected
    assert json.loads(weights("hash", "a.safetensors", "--json")[1])["hash"] == expected
    pictures = []
    for seed in ("3", "3", "4"):
        words = ("sample", "a.safetensors", "--out", "a.png", "--count", "2", "--psi", "0.5", "--seed", seed)
        assert weights(*words)[0] == 0
        pictures.append((tmp_path / "a.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
    reported = json.loads(weights("sample", "a.safetensors", "--out", "a.png", "--count", "1", "--json")[1])
    assert reported["psi"] == [0.7, 1.0] and reported["hash"] == expected


def test_a_generator_with_classes_samples_each(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """By default the first three; one by its number; unknown ones are refused."""
    config = StyleGAN2Config(
        size=8, latent_width=4, style_width=4, mapping_layers=1, channel_base=32, channel_max=4, classes=2
    )
    save_model(
        tmp_path / "a.safetensors", build_model(GeneratorArchitecture(generator=config), torch.Generator())
    )
    words = ("sample", "a.safetensors", "--out", "a.png", "--count", "1")
    assert weights(*words)[0] == 0 and weights(*words, "--label", "1")[0] == 0
    code, out, err = weights(*words, "--label", "2")
    assert code == 2 and "one of the generator's 2 classes" in err and out == ""
    save_model(tmp_path / "b.safetensors", tiny_gan())
    code, _, err = weights("sample", "b.safetensors", "--out", "a.png", "--label", "0")
    assert code == 2 and "has no classes" in err


def test_a_hostile_file_is_one_sentence_and_writes_nothing(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Code 2, the requested name, and no file written."""

    class Gadget:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'owned'}",)

    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"G_ema": Gadget()}))
    code, out, err = weights("import", "a.pkl", "--out", "a.safetensors")
    assert code == 2 and out == "" and "Traceback" not in err
    assert "fedface: a.pkl: names posix.system, which no weights need; nothing of the file was run" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pkl"]


def test_errors_are_one_sentence(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A missing file, a file over itself, another program's file where a fedface checkpoint is expected."""
    checkpoint(tmp_path / "a.pt")
    for words, result in (
        (("import", "none.pkl", "--out", "a.safetensors"), "none.pkl: no such file"),
        (("import", "a.pt", "--out", "a.pt"), "a.pt: exists and will not be replaced"),
        (("show", "a.pt"), "not a readable safetensors file"),
        (("hash", "none.safetensors"), "no such checkpoint"),
    ):
        code, out, err = weights(*words)
        assert code == 2 and out == "" and result in err and "Traceback" not in err
    assert weights("sample", "a.pt", "--out", "a.png", "--psi", "2")[0] == 2


def test_names_from_files_are_printed_safely(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """No markup, no emoji, escape codes as question marks: in names, notes, errors and paths."""
    state = checkpoint(tmp_path / "a.pt").state_dict()
    torch.save({"G_ema": state, "[/red]:smile:": 3, "\x1b[2J": torch.zeros(2)}, tmp_path / "[red].pt")
    code, out, _ = weights("import", "[red].pt", "--out", "[b]o.safetensors")
    assert code == 0 and "\x1b" not in out
    assert "ignored: ?[2J, [/red]:smile:" in out and "wrote [b]o.safetensors" in out
    noted = {"note\x1b[2J": "[/red]\x1b]0;owned\x07", "remarks": "\x1b[2J", "long": "n" * 300}
    save_model(tmp_path / "n.safetensors", replace(tiny_gan(), notes=noted))
    code, out, _ = weights("show", "n.safetensors")
    assert code == 0 and "\x1b" not in out and "\x07" not in out
    assert "note?[2J: [/red]?]0;owned?" in out and f"long: {'n' * 200}... (--json shows all)" in out
    assert weights("import", "n.safetensors", "--out", "m.safetensors")[0] == 0
    with safe_open(str(tmp_path / "n.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        save_file(tensors | {"\x1b[2J": torch.zeros(1)}, tmp_path / "x.safetensors", file.metadata())
    code, out, err = weights("show", "x.safetensors")
    assert code == 2 and "are not expected, the first is ?[2J" in err and "\x1b" not in err


def test_an_unwritable_output_is_refused_before_the_file_is_read(weights, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A folder, this folder, a path below a file; nothing is left behind."""
    checkpoint(tmp_path / "a.pt")
    (tmp_path / "folder").mkdir()
    for out, result in (
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("a.pt/b", "is a file and not a folder"),
    ):
        code, printed, err = weights("import", "a.pt", "--out", out)
        assert code == 2 and printed == "" and result in err and "reading" not in err
        with pytest.raises(WeightsError, match=result):
            save_model(tmp_path / out, tiny_gan())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "folder"]
