"""An uploaded photo, of which only the aligned face crops are stored.

The photo's bytes never touch the disk: a sandboxed child process decodes them from a pipe.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from threading import Event, Lock

import numpy as np
from torch.nn import functional as F

from fedface.errors import LibraryError, PhotoError
from fedface.photos.face_alignment import Detector, Face
from fedface.photos.face_crops import LONGEST_SIDE, face_crops, whole_image
from fedface.photos.image_io import Photo
from fedface.photos.sandboxed_decoder import SandboxedDecoder
from fedface.randomness import Streams
from fedface.reports.charts import pixels_of
from fedface.synthetic.faces import render_people
from fedface.tensor_types import Images, LowImages
from fedface.upsampling.degradation import BicubicPulse
from fedface.web.image_encoding import SHOWN, eight_bits, images_of

FACES_SHOWN = 30  # largest faces of one photo
LEAST = 2  # px, side of the coarsest pixelation


@dataclass(frozen=True, kw_only=True)
class Crop:
    """One face, or a square that is used as a face."""

    truth: Images  # (1, 3, size, size) in [0, 1], at the generator's size
    preview: np.ndarray  # uint8, shape (h, h, 3): the same, large enough to look at
    width: int  # width of the crop in pixels of the photo
    small: Images | None = None  # (1, 3, h, h), the whole picture if it was already a low-resolution face

    @property
    def sides(self) -> tuple[int, ...]:
        """The pixelations that this crop can have, coarsest first: sides that divide the generator's size."""
        size = self.truth.shape[-1]
        most = size // 2 if self.small is None else min(size // 2, self.small.shape[-1])
        return tuple(side for side in range(LEAST, most + 1) if size % side == 0)

    def low(self, side: int) -> LowImages:
        """The crop downscaled to `side` x `side` pixels of eight bits, (1, 3, side, side).

        Raises:
            PhotoError: The crop does not have this pixelation.
        """
        if side not in self.sides:
            sides = ", ".join(map(str, self.sides))
            raise PhotoError(f"This face can be pixelated to {sides} pixels a side, not to {side}.")
        if self.small is not None and self.small.shape[-1] == side:
            return self.small
        return eight_bits(BicubicPulse(self.truth.shape[-1] // side).apply(self.truth))


@dataclass(frozen=True, kw_only=True)
class Upload:
    """The aligned crops of one photo. The photo itself is not stored."""

    crops: tuple[Crop, ...]  # largest face first; the centre square if there is no face
    found: int  # faces in the photo; 0 if none was found or the picture was used as a face
    detected: bool  # whether face detection ran
    key: str = field(default_factory=lambda: secrets.token_urlsafe(16))  # needed to use the upload


class Reader:
    """Decodes photos and finds their faces, one at a time; `close` ends its child process."""

    def __init__(self, size: int, detector: Callable[[], Detector]) -> None:
        """Crops have the generator's `size`; the detector is loaded with the first photo."""
        self.size = size
        self._make_detector = cache(detector)
        self._lock = Lock()
        self._detection: _CountingDetector | None = None

    @cached_property
    def _child(self) -> SandboxedDecoder:
        return SandboxedDecoder(longest_side=LONGEST_SIDE)

    def read(self, content: bytes, cancelled: Event | None = None) -> Upload:
        """Find the faces of a photo, largest first.

        Args:
            content: The file's bytes.
            cancelled: Set by another thread once no caller waits for the faces: the rest of the search is skipped.

        Raises:
            PhotoError: The bytes are not a readable picture, or it is too small; one sentence.
            LibraryError: The detector or the decoder does not start.
        """
        with self._lock:
            photo = self._decoded(content)
            height, width = photo.pixels.shape[:2]
            if min(height, width) < LEAST:
                raise PhotoError(f"This picture has {width} x {height} pixels: too few for a face.")
            self._detection = counting = _CountingDetector(self._make_detector, cancelled or Event())
            try:
                faces = face_crops(
                    photo, lambda: counting, max(SHOWN, self.size), smallest=LEAST, name="this photo"
                )
            except LibraryError:
                if not counting.turns:
                    raise
                square = whole_image(photo, max(SHOWN, self.size), name="this photo")
                crop = self._crop(square.crop, round(square.side), small=False)
                return Upload(crops=(crop,), found=0, detected=True)
        crops = tuple(
            self._crop(face.crop, round(face.side), small=face.already_small) for face in faces[:FACES_SHOWN]
        )
        return Upload(crops=crops, found=faces[0].people, detected=not faces[0].already_small)

    def synthetic_face(self, seed: int) -> Upload:
        """A synthetic face, as an example; equal seeds give equal faces."""
        rendered = render_people(1, 0.5, max(16, self.size), Streams(seed))
        large = render_people(1, 0.5, SHOWN, Streams(seed))
        crop = Crop(truth=eight_bits(rendered), preview=pixels_of(large[0]), width=self.size)
        return Upload(crops=(crop,), found=1, detected=False)

    @property
    def turns(self) -> int:
        """In how many of `face_crops.TURNS` the current photo was searched so far."""
        return 0 if self._detection is None else self._detection.turns

    @property
    def child(self) -> int | None:
        """The PID of the decoding process, if one is running."""
        return self._child.process if "_child" in vars(self) else None

    def close(self) -> None:
        """End the decoding process, if one was started."""
        if "_child" in vars(self):
            self._child.__exit__()

    def _decoded(self, content: bytes) -> Photo:
        try:
            photo = self._child.read_bytes(content)
            if isinstance(photo, PhotoError):
                raise photo
        except PhotoError as error:
            raise PhotoError(
                f"This file cannot be used ({error}); supported are JPEG, PNG, WebP and HEIC."
            ) from error
        return photo

    def _crop(self, pixels: np.ndarray, width: int, *, small: bool) -> Crop:
        picture = images_of(pixels)
        side = (self.size, self.size)
        truth = F.interpolate(picture, size=side, mode="bicubic", antialias=True).clamp(0, 1)
        return Crop(truth=truth, preview=pixels, width=width, small=picture if small else None)


class _CountingDetector:
    """A detector that is loaded on first use, counts its searches and skips those after a cancellation."""

    def __init__(self, detector: Callable[[], Detector], cancelled: Event) -> None:
        self._detector, self._cancelled = detector, cancelled
        self.turns = 0

    @property
    def name(self) -> str:
        return self._detector().name

    def find(self, pixels: np.ndarray) -> list[Face]:
        found = [] if self._cancelled.is_set() else self._detector().find(pixels)
        self.turns += 1
        return found
