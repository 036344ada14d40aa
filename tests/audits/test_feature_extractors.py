"""Features by networks: tiny networks with known outputs, and files that must be refused."""

from __future__ import annotations

import hashlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedface.audits.feature_distances import face_features
from fedface.audits.feature_extractors import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColourFeatures,
    OnnxFeatures,
    TorchScriptFeatures,
    open_features,
)
from fedface.errors import ConfigError, WeightsError
from fedface.randomness import Streams

STREAMS = Streams(31)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def pictures(count: int, side: int = 16) -> Tensor:
    """Random pictures (count, 3, side, side)."""
    return torch.rand(count, 3, side, side, generator=STREAMS.generator("pictures"))


def number(value: int) -> bytes:
    """A protobuf varint."""
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + number(rest) if rest else bytes([low])


def field(tag: int, value: int | str | bytes) -> bytes:
    """A protobuf field: a varint, or bytes with their length."""
    if isinstance(value, int):
        return number(tag << 3) + number(value)
    payload = value.encode() if isinstance(value, str) else value
    return number(tag << 3 | 2) + number(len(payload)) + payload


def onnx_value(name: str, shape: tuple[int, ...]) -> bytes:
    """ONNX's ValueInfoProto of a float32 tensor."""
    dims = b"".join(field(1, field(1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))


def onnx_file(path: Path, operators: dict[str, str], batch: int, side: int) -> Path:
    """An ONNX network (IR 8, opset 13) that applies each operator to the picture: output name -> operator."""
    graph = b"".join(
        field(1, field(1, "x") + field(2, output) + field(3, f"node_{output}") + field(4, operator))
        for output, operator in operators.items()
    )
    graph += field(2, "tiny") + field(11, onnx_value("x", (batch, 3, side, side)))
    for output, operator in operators.items():
        shape = (1, 1, 1, 1) if operator == "ReduceMean" else (batch, 3, 1, 1)
        graph += field(12, onnx_value(output, shape))
    path.write_bytes(field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13)))
    return path


class Pool(torch.nn.Module):
    """The mean and the maximum of each channel, with the picture itself between them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x.mean(dim=(2, 3)), x, x.amax(dim=(2, 3))


class Broken(torch.nn.Module):
    """Not a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) / 0.0


class Whole(torch.nn.Module):
    """One row for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(0, 2, 3))[None]


class Picky(torch.nn.Module):
    """Accepts only 24 pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 3 * 24 * 24)


def script_file(path: Path, network: torch.nn.Module) -> Path:
    """The network as TorchScript."""
    torch.jit.save(torch.jit.script(network), str(path))
    return path


def test_every_feature_config_has_its_own_kind() -> None:
    """The `kind:` in YAML."""
    kinds = [source.kind for source in (ColourFeatures, OnnxFeatures, TorchScriptFeatures)]
    assert kinds == ["colour-features", "onnx-features", "torchscript-features"]


def test_colour_features_in_batches_are_the_features_and_name_no_file() -> None:
    images = pictures(520, 8)
    extractor = open_features(ColourFeatures())
    torch.testing.assert_close(extractor.features(images), face_features(images), rtol=0, atol=1e-12)
    assert extractor.identity.sha256 == "" and "132 CIELAB" in str(extractor.identity)


def test_an_onnx_average_gives_the_normalised_mean_of_each_channel(tmp_path: Path) -> None:
    """(mean of the picture - mean) / std; batches that do not divide the count change nothing."""
    path = onnx_file(tmp_path / "mean.onnx", {"pooled": "GlobalAveragePool"}, 4, 16)
    images = pictures(6)
    source = OnnxFeatures(path=path, size=16, mean=IMAGENET_MEAN, std=IMAGENET_STD, batch=4)
    expected = (images.double().mean(dim=(2, 3)) - torch.tensor(IMAGENET_MEAN).double()) / torch.tensor(
        IMAGENET_STD
    ).double()
    torch.testing.assert_close(open_features(source).features(images), expected, rtol=0, atol=1e-5)


def test_the_named_output_of_an_onnx_network_is_used(tmp_path: Path) -> None:
    """With two outputs one must be named; the error for an unknown name lists them."""
    operators = {"mean": "GlobalAveragePool", "most": "GlobalMaxPool"}
    path = onnx_file(tmp_path / "two.onnx", operators, 2, 16)
    images = pictures(2)
    most = open_features(OnnxFeatures(path=path, size=16, output="most", batch=2, **PLAIN)).features(images)
    torch.testing.assert_close(most, images.double().amax(dim=(2, 3)), rtol=0, atol=1e-6)
    with pytest.raises(WeightsError, match="two.onnx has 2 outputs; choose one of"):
        open_features(OnnxFeatures(path=path, size=16, batch=2, **PLAIN))
    with pytest.raises(WeightsError, match="no output 'pool3'; it has"):
        open_features(OnnxFeatures(path=path, size=16, output="pool3", batch=2, **PLAIN))


def test_a_network_exported_for_one_face_is_run_one_by_one_and_refused_otherwise(shared: Path) -> None:
    """A real face network, 112 px to 128 numbers, whose export fixed the batch at one."""
    path = shared / "data/models/mobilefacenet_112_128d.onnx"
    images = pictures(3, 64)
    one = OnnxFeatures(path=path, size=112, mean=IMAGENET_MEAN, std=IMAGENET_STD, batch=1)
    rows = open_features(one).features(images)
    assert rows.shape == (3, 128)
    torch.testing.assert_close(open_features(one).features(images[1:2]), rows[1:2], rtol=1e-5, atol=1e-5)
    two = OnnxFeatures(path=path, size=112, mean=IMAGENET_MEAN, std=IMAGENET_STD, batch=2)
    with pytest.raises(WeightsError, match="one row for each of 2 faces.*give a batch of 1"):
        open_features(two).features(images)


def test_a_torchscript_network_gives_the_chosen_output_and_maps_are_averaged(tmp_path: Path) -> None:
    """Output 0 is a mean, 2 a maximum, 1 a map whose average is the mean again."""
    path = script_file(tmp_path / "pool.pt", Pool())
    images = pictures(5)
    means, maps, most = (
        open_features(TorchScriptFeatures(path=path, size=16, output=output, batch=2, **PLAIN)).features(
            images
        )
        for output in range(3)
    )
    torch.testing.assert_close(means, images.double().mean(dim=(2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(most, images.double().amax(dim=(2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(maps, means, rtol=0, atol=1e-6)


def test_a_range_of_0_to_255_is_a_standard_deviation_of_1_255th(tmp_path: Path) -> None:
    path = script_file(tmp_path / "pool.pt", Pool())
    source = TorchScriptFeatures(path=path, size=16, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    white = open_features(source).features(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(white, torch.full((1, 3), 255.0).double(), rtol=1e-6, atol=0)


def test_faces_are_resized_with_antialiasing(tmp_path: Path) -> None:
    """A one-pixel chessboard becomes grey, not one of its two colours."""
    path = script_file(tmp_path / "pool.pt", Pool())
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    images = board.float().expand(1, 3, 64, 64)
    small = open_features(TorchScriptFeatures(path=path, size=16, output=2, **PLAIN)).features(images)
    torch.testing.assert_close(small, torch.full((1, 3), 0.5).double(), rtol=0, atol=0.06)


def test_the_identity_is_the_digest_of_file_and_settings_not_the_path(tmp_path: Path) -> None:
    one, other = script_file(tmp_path / "a.pt", Pool()), tmp_path / "b.pt"
    other.write_bytes(one.read_bytes())
    first = open_features(TorchScriptFeatures(path=one, size=16, **PLAIN)).identity
    assert first.sha256 == hashlib.sha256(one.read_bytes()).hexdigest()
    assert open_features(TorchScriptFeatures(path=other, size=16, **PLAIN)).identity == first
    assert open_features(TorchScriptFeatures(path=other, size=32, **PLAIN)).identity != first
    assert open_features(TorchScriptFeatures(path=other, size=16, output=1, **PLAIN)).identity != first


def test_a_pinned_file_must_be_that_file(tmp_path: Path) -> None:
    path = script_file(tmp_path / "pool.pt", Pool())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    open_features(TorchScriptFeatures(path=path, size=16, sha256=digest, **PLAIN))
    with pytest.raises(WeightsError, match="not the pinned file: its SHA-256 is"):
        open_features(TorchScriptFeatures(path=path, size=16, sha256="0" * 64, **PLAIN))


@pytest.mark.parametrize("kind", [OnnxFeatures, TorchScriptFeatures])
def test_missing_or_invalid_files_are_refused_in_one_sentence(
    kind: Callable[..., OnnxFeatures | TorchScriptFeatures], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="no feature network at"):
        open_features(kind(path=tmp_path / "none", size=16, **PLAIN))
    for name, content in {"empty": b"", "text": b"rubbish" * 50, "zip": b"PK\x03\x04" + bytes(200)}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=f"{name} is not an? .* that this"):
            open_features(kind(path=tmp_path / name, size=16, **PLAIN))


class Planted:
    """Unpickled by Python, this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_pickle_disguised_as_torchscript_is_refused_and_not_executed(tmp_path: Path) -> None:
    """torch.jit parses pickles without executing Python; Python's own unpickler would execute this one."""
    content = pickle.dumps(Planted(tmp_path / "ran"), protocol=2)
    pickle.loads(content).close()  # noqa: S301, the plant itself
    (tmp_path / "ran").unlink()
    script_file(tmp_path / "pool.pt", Pool())
    with zipfile.ZipFile(tmp_path / "pool.pt") as good, zipfile.ZipFile(tmp_path / "net.pt", "w") as bad:
        for name in good.namelist():
            bad.writestr(name, content if name.endswith("data.pkl") else good.read(name))
    with pytest.raises(WeightsError, match="is not a TorchScript file"):
        open_features(TorchScriptFeatures(path=tmp_path / "net.pt", size=16, **PLAIN))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Broken(), "not finite; check mean and std"),
        (Whole(), "one row for each of 4 faces"),
        (Picky(), "does not accept"),
    ],
)
def test_networks_without_one_finite_row_per_face_are_refused(
    network: torch.nn.Module, words: str, tmp_path: Path
) -> None:
    source = TorchScriptFeatures(path=script_file(tmp_path / "net.pt", network), size=16, batch=4, **PLAIN)
    with pytest.raises(WeightsError, match=words):
        open_features(source).features(pictures(4))


def test_an_output_that_a_torchscript_network_does_not_have_is_refused(tmp_path: Path) -> None:
    source = TorchScriptFeatures(path=script_file(tmp_path / "p.pt", Pool()), size=16, output=3, **PLAIN)
    with pytest.raises(WeightsError, match="output 3 is not among its 3"):
        open_features(source).features(pictures(2))


def test_onnx_without_opencv_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = onnx_file(tmp_path / "mean.onnx", {"pooled": "GlobalAveragePool"}, 1, 16)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="need OpenCV: run"):
        open_features(OnnxFeatures(path=path, size=16, **PLAIN))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": 4}, "size must lie in"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be three numbers > 0"),
        ({"mean": (0.0, 0.0)}, "mean must be three"),
        ({"sha256": "abc"}, "64 hexadecimal digits"),
        ({"batch": 0}, "batch must lie in"),
        ({"output": -1}, "output must be at least 0"),
    ],
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TorchScriptFeatures(**{"path": Path("x"), "size": 16, **PLAIN, **wrong})  # type: ignore[arg-type]
