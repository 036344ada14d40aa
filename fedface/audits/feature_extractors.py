"""Where the features come from that two sets of faces are compared by: fixed mathematics, or a network by path.

`ColourFeatures` needs no file and is the default; `OnnxFeatures` and `TorchScriptFeatures` name a file that the user
brings, such as Inception's pool3, which published FID and KID use. Nothing is ever downloaded. Each result carries the
identity of its features (the settings and the SHA-256 of the very bytes that ran), so that metrics of different
features are not compared.

A TorchScript file is a program. It cannot call Python, but it can do all that
torch's operators can, which includes reading files, writing to mapped ones and filling the memory; open only
files that you would also run. An ONNX file is a list of layers that OpenCV's C++ parser reads: no program, yet
a hostile one can aim at faults in the parser. `sha256` pins either to the bytes that you have looked at.

Sources: Szegedy et al. 2016 (arXiv:1512.00567) for Inception; Parmar, Zhang, Zhu 2022 (arXiv:2104.11222) for
what careless resizing does to such metrics: faces are resized here by antialiased bicubic interpolation.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Protocol, assert_never

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedface.audits.feature_distances import FEATURE_WIDTH, face_features
from fedface.errors import ConfigError, WeightsError
from fedface.tensor_types import Images
from fedface.validation import In, NonNegativeInt, checked

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what most ImageNet networks were trained with, for convenience
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST_FILE = 2**31  # bytes; no ONNX file can be larger
_COLOUR_BATCH = 512  # faces at once: bounds the memory of the colour features


@dataclass(frozen=True, kw_only=True)
class ColourFeatures:
    """The 132 CIELAB cosines and Haar contrasts of audits/feature_distances."""

    kind: ClassVar[str] = "colour-features"


@dataclass(frozen=True, kw_only=True)
class _NetworkFeatures:
    """A network in a file. It receives (image - mean) / std of sRGB in [0, 1], RGB, (batch, 3, size, size)."""

    path: Path
    size: Annotated[int, In("[8, 2048]")]  # pixels: the side that the network expects
    # Of red, green, blue in [0, 1]; (0, 0, 0) where the network subtracts its own.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]  # 1/255 each for a network that expects [0, 255]
    sha256: str = ""  # the file's digest if it must be this very file; empty accepts any
    # Faces at once; 1 for a network exported with a fixed batch of one.
    batch: Annotated[int, In("[1, 1024]")] = 16

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"mean must be three finite numbers, got {self.mean}")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std must be three numbers > 0, got {self.std}")
        if self.sha256 and not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"sha256 must be empty or 64 hexadecimal digits in lower case, got {self.sha256!r}"
            )


@dataclass(frozen=True, kw_only=True)
@checked
class OnnxFeatures(_NetworkFeatures):
    """A network in ONNX, run by OpenCV."""

    kind: ClassVar[str] = "onnx-features"

    output: str = ""  # name of the output to read; empty where the network has one


@dataclass(frozen=True, kw_only=True)
@checked
class TorchScriptFeatures(_NetworkFeatures):
    """A network in TorchScript: a program, see above."""

    kind: ClassVar[str] = "torchscript-features"

    output: NonNegativeInt = 0  # which one to read where the network returns several


FeatureSource = ColourFeatures | OnnxFeatures | TorchScriptFeatures


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """Which features a metric was computed from. Metrics may be compared where identities are equal."""

    name: str  # kind and settings, as text; no path
    sha256: str  # of the network's file; empty for fixed mathematics, which has none

    def __str__(self) -> str:
        return f"{self.name}, SHA-256 {self.sha256}" if self.sha256 else self.name


class Extractor(Protocol):
    """Turns faces into rows of numbers."""

    identity: FeatureIdentity

    def features(self, images: Images) -> Tensor:
        """(n, 3, h, w) sRGB, clamped to [0, 1] -> (n, d) float64, finite; a row depends on its own face alone."""


def open_features(source: FeatureSource) -> Extractor:
    """The extractor that a source describes; a file is read once, and what was hashed is what runs.

    Raises:
        WeightsError: The file is missing, too large, not what its kind says, or not the pinned one.
        ConfigError: ONNX features need OpenCV, which is not installed.
    """
    match source:
        case ColourFeatures():
            return ColourExtractor()
        case OnnxFeatures():
            return _open_onnx(source)
        case TorchScriptFeatures():
            return _open_torchscript(source)
        case _:
            assert_never(source)


class ColourExtractor:
    """`face_features`, in batches that bound the memory."""

    identity = FeatureIdentity(
        name=f"colour features, version 1: {FEATURE_WIDTH} CIELAB cosines and Haar contrasts at 32 px",
        sha256="",
    )

    def features(self, images: Images) -> Tensor:
        """132 numbers for each face; see `face_features`."""
        starts = range(0, max(1, len(images)), _COLOUR_BATCH)
        return torch.cat([face_features(images[start : start + _COLOUR_BATCH]) for start in starts])


class NetworkExtractor:
    """A network's outputs: resized, normalised, in batches of one size, averaged over positions if it has any."""

    def __init__(
        self,
        source: OnnxFeatures | TorchScriptFeatures,
        identity: FeatureIdentity,
        forward: Callable[[Tensor], Tensor],
    ) -> None:
        self._source = source
        self.identity = identity
        self._forward = forward

    @torch.inference_mode()
    def features(self, images: Images) -> Tensor:
        """The network's numbers for each face.

        Raises:
            WeightsError: The network does not accept the images, or does not return one finite row per face.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (n, 3, h, w), got {tuple(images.shape)}")
        if len(images) == 0:
            raise ValueError("images must hold at least one face, got none")
        step = self._source.batch
        return torch.cat([self._rows(images[start : start + step]) for start in range(0, len(images), step)])

    def _rows(self, part: Images) -> Tensor:
        count, batch, name = len(part), self._source.batch, self._source.path.name
        # A last batch of another size would make OpenCV plan the network anew, so it is filled up.
        full = part[torch.arange(batch).clamp(max=count - 1)]
        features = self._forward(_prepare(full, self._source))
        if features.ndim < 2 or len(features) != batch:
            raise WeightsError(
                f"{name}: expected one row for each of {batch} faces, got shape {tuple(features.shape)}; give a batch "
                "of 1 if the network was exported for one face, or choose another output"
            )
        rows = (
            features[:count].double().flatten(2).mean(dim=2)
            if features.ndim > 2
            else features[:count].double()
        )
        if not rows.isfinite().all():
            raise WeightsError(f"{name} returned numbers that are not finite; check mean and std")
        return rows


def _prepare(images: Images, source: OnnxFeatures | TorchScriptFeatures) -> Images:
    x, size = images.detach().float().clamp(0, 1), (source.size, source.size)
    if tuple(x.shape[2:]) != size:
        x = F.interpolate(x, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    mean, std = torch.tensor(source.mean).view(1, 3, 1, 1), torch.tensor(source.std).view(1, 3, 1, 1)
    return ((x - mean) / std).contiguous()


def _read(source: OnnxFeatures | TorchScriptFeatures, kind: str) -> tuple[bytes, FeatureIdentity]:
    """The file's bytes, and their identity."""
    path = source.path
    if not path.is_file():
        raise WeightsError(f"no feature network at {path}; expected a file in {kind}")
    if path.stat().st_size > LARGEST_FILE:
        raise WeightsError(
            f"{path} has {path.stat().st_size} bytes; a feature network may have {LARGEST_FILE}"
        )
    blob = path.read_bytes()
    digest = hashlib.sha256(blob).hexdigest()
    if source.sha256 and digest != source.sha256:
        raise WeightsError(
            f"{path} is not the pinned file: its SHA-256 is {digest}, expected {source.sha256}"
        )
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (source.mean, source.std))
    settings = f"{source.size} px bicubic, mean ({mean}), std ({std}), output {source.output or 0}"
    return blob, FeatureIdentity(name=f"{kind} network, {settings}", sha256=digest)


def _open_torchscript(source: TorchScriptFeatures) -> NetworkExtractor:
    blob, identity = _read(source, "TorchScript")
    name = source.path.name
    try:
        network = torch.jit.load(io.BytesIO(blob), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as cause:
        raise WeightsError(f"{source.path} is not a TorchScript file that this torch can read") from cause

    def forward(x: Tensor) -> Tensor:
        try:
            features = network(x)
        except (RuntimeError, torch.jit.Error) as cause:
            raise WeightsError(f"{name} does not accept images of shape {tuple(x.shape)}") from cause
        several = list(features) if isinstance(features, tuple | list) else [features]
        if source.output >= len(several) or not isinstance(several[source.output], Tensor):
            raise WeightsError(f"{name}: output {source.output} is not among its {len(several)} tensors")
        chosen: Tensor = several[source.output]
        return chosen

    return NetworkExtractor(source, identity, forward)


def _open_onnx(source: OnnxFeatures) -> NetworkExtractor:
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as cause:
        raise ConfigError('ONNX features need OpenCV: run `pip install "fedface[yunet]"`') from cause
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    blob, identity = _read(source, "ONNX")
    name = source.path.name
    try:
        network = cv2.dnn.readNetFromONNX(np.frombuffer(blob, dtype=np.uint8))
        outputs = list(network.getUnconnectedOutLayersNames())
    except cv2.error as cause:
        raise WeightsError(f"{source.path} is not an ONNX network that this OpenCV can read") from cause
    if source.output and source.output not in outputs:
        raise WeightsError(f"{name} has no output {source.output!r}; it has {', '.join(outputs)}")
    if not source.output and len(outputs) != 1:
        raise WeightsError(f"{name} has {len(outputs)} outputs; choose one of {', '.join(outputs)}")
    chosen = source.output or outputs[0]

    def forward(x: Tensor) -> Tensor:
        try:
            network.setInput(x.numpy())
            return torch.from_numpy(np.array(network.forward(chosen)))
        except cv2.error as cause:
            raise WeightsError(f"{name} does not accept images of shape {tuple(x.shape)}") from cause

    return NetworkExtractor(source, identity, forward)
