"""Face detectors: those of the installed packages, and a better one that the user supplies.

A detector that misses some people's faces is where bias enters a
photo library first (docs/detection.md has the measured rates), so the default never uses the cheap detector
alone. Sources: HOG (Dalal and Triggs 2005) and max-margin detection (King 2015, arXiv:1502.00046), both in
dlib; 68 landmarks (Kazemi and Sullivan 2014); YuNet (Wu et al. 2023).
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType

import dlib
import numpy as np

from fedface.errors import LibraryError
from fedface.photos.face_alignment import Face, usable
from fedface.photos.image_io import shrink

HOG_SIDE = 800  # pixels; above it, faces smaller than about 1/20 of the photo are not looked for
MMOD_SIDE = 480  # the network costs about 5 microseconds a pixel and core: this bounds it to a second
MMOD_LEAST = 96  # pixels; the network's filters do not fit into a narrower picture
YUNET_SIDE = 800
YUNET_SURE = 0.6  # scores below this are not faces
HOG_LEAST = 8  # pixels; dlib refuses rows of a single pixel
SURE = 0.25  # HOG scores below this are false alarms about as often as faces


def _model_file(name: str) -> Path:
    """A file of the package `face_recognition_models`, whose import would need the retired pkg_resources."""
    spec = importlib.util.find_spec("face_recognition_models")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / "models" / name).is_file():
            return Path(folder) / "models" / name
    raise LibraryError(
        f"the face detector needs {name} from the package face_recognition_models, which is not installed; "
        "run `pip install face_recognition_models` or give a YuNet file instead"
    )


@cache
def _landmark_model() -> dlib.shape_predictor:
    """Shared by all detectors of a process: reading its 100 MB takes a second."""
    return dlib.shape_predictor(str(_model_file("shape_predictor_68_face_landmarks.dat")))


def _face(pixels: np.ndarray, box: dlib.rectangle, score: float) -> Face:
    """With dlib's 68 points, reduced to five: the means of the eyes' points, the nose tip, the mouth corners."""
    shape = _landmark_model()(pixels, box)
    points = np.array([(point.x, point.y) for point in shape.parts()], dtype=np.float64)
    five = np.stack([points[36:42].mean(0), points[42:48].mean(0), points[30], points[48], points[54]])
    return Face((box.left(), box.top(), box.right(), box.bottom()), five, float(score))


class HogDetector:
    """dlib's histogram-of-gradients detector alone: fast, and blind to many faces. For comparison only."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        self._threshold = threshold

    @property
    def name(self) -> str:
        return f"hog {HOG_SIDE} px, threshold {self._threshold:g}"

    @cached_property
    def _hog(self) -> dlib.fhog_object_detector:
        return dlib.get_frontal_face_detector()

    def find(self, pixels: np.ndarray) -> list[Face]:
        """All faces that score above the threshold, largest first."""
        shrunk = shrink(pixels, HOG_SIDE)
        small = _at_least(shrunk, HOG_LEAST)
        boxes, scores, _ = self._hog.run(small, 1, self._threshold)
        faces = [_face(small, box, score) for box, score in zip(boxes, scores, strict=True)]
        factor = pixels.shape[1] / shrunk.shape[1]
        return usable([face.scaled(factor) for face in faces])


class NetworkDetector:
    """dlib's network (MMOD) alone, at a picture of at most MMOD_SIDE pixels; one of at most half that is enlarged.

    How long it takes depends on the picture's size alone, not on what is seen: for metrics that leave a device. So the
    landmarks' file is read here, and not at the first face.
    """

    def __init__(self) -> None:
        _landmark_model()

    @property
    def name(self) -> str:
        return f"mmod {MMOD_SIDE} px"

    @cached_property
    def _network(self) -> dlib.cnn_face_detection_model_v1:
        return dlib.cnn_face_detection_model_v1(str(_model_file("mmod_human_face_detector.dat")))

    def find(self, pixels: np.ndarray) -> list[Face]:
        """All faces that the network finds, largest first."""
        small = _at_least(shrink(pixels, MMOD_SIDE), MMOD_LEAST)
        doublings = 1 if max(small.shape[:2]) * 2 <= MMOD_SIDE + 32 else 0
        found = self._network(small, doublings)
        faces = [_face(small, hit.rect, hit.confidence) for hit in found]
        factor = max(pixels.shape[:2]) / min(MMOD_SIDE, max(pixels.shape[:2]))
        return usable([face.scaled(factor) for face in faces])


class EmbeddedDetector:
    """The default: HOG where it is sure, and dlib's network (MMOD) wherever HOG is not. Files come by pip.

    The network looks at a picture of at most MMOD_SIDE pixels; one of at most half that is enlarged twofold.
    """

    def __init__(self) -> None:
        self._first = HogDetector(threshold=SURE)

    @property
    def name(self) -> str:
        return f"hog {HOG_SIDE} px, threshold {SURE:g}, else mmod {MMOD_SIDE} px"

    @cached_property
    def _second(self) -> NetworkDetector:
        return NetworkDetector()

    def find(self, pixels: np.ndarray) -> list[Face]:
        """HOG's faces, or the network's where HOG finds none, largest first."""
        return self._first.find(pixels) or self._second.find(pixels)


def _at_least(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture with its last row and column repeated until both sides are long enough."""
    down, right = (max(0, side - length) for length in pixels.shape[:2])
    padded = np.pad(pixels, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else pixels
    return np.ascontiguousarray(padded)


class YuNetDetector:
    """YuNet through OpenCV: the best and the fastest measured; the model file is the user's to supply.

    Where it finds nothing it looks once more, at a small picture enlarged twofold or a large one halved.
    """

    def __init__(self, path: Path) -> None:
        """Load the ONNX file.

        Raises:
            LibraryError: OpenCV or the file is missing, or OpenCV cannot read it.
        """
        self._cv2 = cv2 = _opencv()
        if not path.is_file():
            raise LibraryError(f"no YuNet model at {path}; expected face_detection_yunet_2023mar.onnx")
        try:
            self._network = cv2.FaceDetectorYN.create(str(path), "", (320, 320), YUNET_SURE)
        except cv2.error as cause:
            raise LibraryError(f"{path} is not a YuNet model that this OpenCV can read") from cause

    @property
    def name(self) -> str:
        return f"yunet {YUNET_SIDE} px, threshold {YUNET_SURE:g}, two sizes"

    def find(self, pixels: np.ndarray) -> list[Face]:
        """All faces that score above the threshold, largest first."""
        small = np.ascontiguousarray(shrink(pixels, YUNET_SIDE)[:, :, ::-1])  # YuNet was trained on BGR
        faces = self._look(small, pixels.shape[1])
        if faces or min(small.shape[:2]) < 16:
            return faces
        small_enough = 2 * max(small.shape[:2]) <= YUNET_SIDE
        scale, how = (2.0, self._cv2.INTER_CUBIC) if small_enough else (0.5, self._cv2.INTER_AREA)
        other = self._cv2.resize(small, None, fx=scale, fy=scale, interpolation=how)
        return self._look(other, pixels.shape[1])

    def _look(self, small: np.ndarray, width: int) -> list[Face]:
        """The faces in a BGR picture, in pixels of the same picture at the given width."""
        self._network.setInputSize((small.shape[1], small.shape[0]))
        _, found = self._network.detect(small)
        rows = np.zeros((0, 15)) if found is None else np.asarray(found, dtype=np.float64)
        factor = width / small.shape[1]
        return usable([_yunet_face(row).scaled(factor) for row in rows if np.isfinite(row).all()])


def _yunet_face(row: np.ndarray) -> Face:
    left, top, width, height = (float(number) for number in row[:4])
    return Face((left, top, left + width, top + height), row[4:14].reshape(5, 2), float(row[14]))


def _opencv() -> ModuleType:
    """OpenCV is optional, so it is imported only for a YuNet file."""
    try:
        cv2 = importlib.import_module("cv2")
    except ImportError as cause:
        raise LibraryError('YuNet needs OpenCV: run `pip install "fedface[yunet]"`') from cause
    # Errors only: each network would otherwise announce a target that it does not use.
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    return cv2


def load_detector(path: Path | None) -> EmbeddedDetector | YuNetDetector:
    """YuNet from an .onnx file, or the built-in detector."""
    return EmbeddedDetector() if path is None else YuNetDetector(path)
