"""One photo file in, upright sRGB pixels out, or the reason why not; and the few pictures that we write.

The only door to Pillow. A device decodes photos in the child process of `sandboxed_decoder` alone. A file's kind is
known by its first bytes, its size in the header is checked before anything is decoded, and a file that is cut short is
refused, never half used.
Sources: magic numbers from the formats' specifications; alignment resampling as in FFHQ (Karras et al. 2019).
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pillow_heif
from PIL import (
    Image,
    ImageCms,
    ImageFile,
    ImageFilter,
    IptcImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)

from fedface.errors import PhotoError
from fedface.photos.exif import ExifMetadata, read_exif
from fedface.platforms import BINARY, NO_WAITING

MAX_BYTES = 200_000_000
MAX_PIXELS = 100_000_000  # of a picture that is decoded at full size
# Of one that is shrunk at once, within the memory of the sandbox; a JPEG is decoded at half its size or less.
MAX_SHRUNK_PIXELS = {"JPEG": 400_000_000, "PNG": 225_000_000, "WebP": 225_000_000, "HEIF": 225_000_000}

READ_KINDS = ("JPEG", "PNG", "WebP", "HEIF")
HEIF_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"}
MAGIC = {
    b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"GIF87a": "GIF", b"GIF89a": "GIF", b"8BPS": "PSD",
    b"FUJIFILMCCD-RAW": "RAF", b"IIU\0": "RW2", b"IIRO": "ORF", b"IIRS": "ORF", b"MMOR": "ORF", b"FOVb": "X3F",
    b"\0MRM": "MRW", b"II\x1a\0\0\0HEAPCCDR": "CRW", b"\0\0\0\x0cJXL \r\n\x87\n": "JXL", b"\xff\x0a": "JXL",
    b"\0\0\0\x0cjP  \r\n\x87\n": "JP2", b"\xff\x4f\xff\x51": "JP2",
    b"II*\0\x10\0\0\0CR\2": "CR2", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF",
}  # fmt: skip
TIFF_RAWS = {
    ".dng", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".cr2", ".pef", ".srw", ".3fr", ".iiq", ".rwl", ".erf", ".mef",
    ".mos", ".dcr", ".kdc",
}  # fmt: skip  # kinds that are TIFF by their first bytes
PICTURE_SUFFIXES = TIFF_RAWS | {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".heic", ".heif", ".hif", ".tif", ".tiff", ".gif",
    ".bmp", ".avif", ".cr3", ".crw", ".raf", ".rw2", ".orf", ".x3f", ".mrw", ".jxl", ".jp2", ".j2k", ".psd",
}  # fmt: skip
EMPTY_EXIF = 24  # bytes of an EXIF block without any tag
HEAD = 4096  # bytes that identify a file
# In the PNG files that we write, so that no reader of folders takes them for photos. No program's name begins like it.
SOFTWARE = "fedface: not a photo"
# In the first bytes of such a file; in the last where another program saved it again.
PICTURE_MARK = f"tEXtSoftware\0{SOFTWARE}"

# What decoders raise on broken files. Anything else ends the child process that scans, which is a reason too.
DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, ArithmeticError, AttributeError,
    RuntimeError, MemoryError, struct.error, zlib.error, UnidentifiedImageError, Image.DecompressionBombError,
)  # fmt: skip

pillow_heif.register_heif_opener(thumbnails=False)
pillow_heif.options.DECODE_THREADS = 1
Image.MAX_IMAGE_PIXELS = MAX_SHRUNK_PIXELS["JPEG"]
_SRGB = ImageCms.createProfile("sRGB")


class PhotoUnreadable(PhotoError):
    """The file could not be reached or finished this time; another try may succeed."""


@dataclass(frozen=True)
class Photo:
    """One decoded photo, turned upright, in sRGB."""

    pixels: np.ndarray  # uint8, shape (h, w, 3); smaller than the file where a longest side was given
    width: int  # pixels of the whole photo, after turning it upright
    height: int
    kind: str  # one of READ_KINDS
    metadata: ExifMetadata


def sniff(head: bytes) -> str | None:
    """The kind of picture that a file's first 32 bytes announce, or `None` for anything else."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WebP"
    if head[4:8] == b"ftyp":
        brands = {head[8:12]} | {head[at : at + 4] for at in range(16, 32, 4)}
        if brands & {b"avif", b"avis"}:
            return "AVIF"
        if b"crx " in brands:
            return "CR3"
        return "HEIF" if brands & HEIF_BRANDS else None
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "BMP"
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def classify_file(path: Path) -> Literal["picture", "made by fedface", "other"]:
    """The kind of a regular file by its first bytes or its name; pictures written by fedface carry a mark."""
    claims = path.suffix.lower() in PICTURE_SUFFIXES
    try:
        with _open_regular(path) as file:
            head = file.read(HEAD)
            file.seek(max(HEAD, os.fstat(file.fileno()).st_size - HEAD))
            tail = file.read()
    except PhotoUnreadable:
        return "picture"  # so that reading it says why
    except (PhotoError, OSError):
        return "picture" if claims else "other"
    if sniff(head) == "PNG" and PICTURE_MARK.encode() in head + tail:
        return "made by fedface"
    return "picture" if claims or sniff(head) is not None else "other"


def read_photo(path: Path, *, longest_side: int | None = None) -> Photo:
    """Decode one photo file.

    Guarantees:
        * A file above MAX_BYTES or, by its header, above MAX_PIXELS is refused before it is decoded. If a longest side
          is given, up to MAX_SHRUNK_PIXELS are read, and come back at half their size or less.
        * All eight EXIF orientations are applied; an invalid one counts as upright.
        * An animation, burst or stereo pair gives its first (HEIF: its primary) picture.
        * Broken EXIF or a broken colour profile never refuses a photo.

    Args:
        path: A regular file of any name.
        longest_side: Shrink to at most this many pixels (never enlarge); JPEG decodes faster for it.

    Raises:
        PhotoUnreadable: The file cannot be opened.
        PhotoError: The file cannot be used; the text is the reason.
    """
    with _open_regular(path) as file:
        head = file.read(32)
        kind = _checked_kind(path, head)
        file.seek(0)
        return _decode(file, kind, longest_side)


def read_photo_bytes(content: bytes, *, longest_side: int | None = None) -> Photo:
    """Decode a photo from memory (a member of an archive), under the same rules as `read_photo`."""
    if not content:
        raise PhotoError("empty file")
    kind = _checked_kind(Path("photo"), content[:32])
    return _decode(io.BytesIO(content), kind, longest_side)


def content_hash(path: Path) -> bytes:
    """The SHA-256 of a file's bytes: two files of equal bytes are one photo.

    Raises:
        PhotoError: As for `read_photo`, whatever the file holds.
    """
    digest = hashlib.sha256()
    with _open_regular(path) as file:
        try:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        except OSError as cause:
            raise PhotoUnreadable(f"cannot be read: {cause.strerror or cause}") from cause
    return digest.digest()


def _open_regular(path: Path) -> BinaryIO:
    """Open a file without ever waiting on a pipe, and refuse anything but a regular file of at most MAX_BYTES."""
    try:
        descriptor = os.open(path, os.O_RDONLY | BINARY | NO_WAITING)
    except OSError as cause:
        raise PhotoUnreadable(f"cannot be opened: {cause.strerror or cause}") from cause
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= MAX_BYTES:
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise PhotoError("not a regular file")
    if status.st_size == 0:
        raise PhotoError("empty file")
    raise PhotoError(f"larger than {MAX_BYTES // 1_000_000} MB ({status.st_size // 1_000_000} MB)")


def _checked_kind(path: Path, head: bytes) -> str:
    """The kind by content, if we read that kind."""
    kind, suffix = sniff(head), path.suffix.lower()
    if kind is None and (
        cut := next((kind for magic, kind in MAGIC.items() if magic.startswith(head)), None)
    ):
        raise PhotoError(f"a {cut} cut short after {len(head)} bytes")
    if kind is None:
        named = suffix in PICTURE_SUFFIXES
        raise PhotoError(f"named {suffix} but holds no picture" if named else "not a picture")
    if kind == "TIFF" and suffix in TIFF_RAWS:
        kind = suffix[1:].upper()
    if kind not in READ_KINDS:
        raise PhotoError(f"kind not read: {kind}")
    return kind


def _decode(file: BinaryIO, kind: str, longest_side: int | None) -> Photo:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=[kind.upper()]) as image:
                return _upright_srgb(image, kind, longest_side)
    except PhotoError:
        raise
    except UnidentifiedImageError as cause:
        raise PhotoError(f"broken {kind}: its header is cut short or damaged") from cause
    except Image.DecompressionBombError as cause:
        raise PhotoError(f"more than {MAX_PIXELS // 1_000_000} megapixels") from cause
    except MemoryError as cause:
        raise PhotoError("needs more memory than photos may") from cause
    except DECODER_ERRORS as cause:
        reason = " ".join(str(cause).split())[:120] or type(cause).__name__
        raise PhotoError(f"broken {kind}: {reason}") from cause


def _upright_srgb(image: ImageFile.ImageFile, kind: str, longest_side: int | None) -> Photo:
    width, height = image.size
    target = _shrunk_size(width, height, longest_side or max(width, height))
    limit = MAX_PIXELS if longest_side is None else MAX_SHRUNK_PIXELS[kind]
    if width * height > limit:
        raise PhotoError(f"more than {limit // 1_000_000} megapixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        target = min(target, (width // 2, height // 2))
    if target != (width, height):
        image.draft(None, target)
    metadata, orientation = _exif(image)
    profile = image.info.get("icc_profile")
    image.load()
    small: Image.Image = image
    if max(target) < max(image.size):
        small = _eight_bits(image).resize(target, Image.Resampling.LANCZOS)
    turned = _srgb(_eight_bits(small), profile)
    if orientation in _TURNS:
        turned = turned.transpose(_TURNS[orientation])
        if orientation >= 5:
            width, height = height, width
    return Photo(np.asarray(turned, dtype=np.uint8), width, height, kind, metadata)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def _shrunk_size(width: int, height: int, longest_side: int) -> tuple[int, int]:
    scale = min(1.0, longest_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _exif(image: ImageFile.ImageFile) -> tuple[ExifMetadata, int]:
    """The metadata and the orientation 1 to 8; both fall back to "nothing known"."""
    exif, orientation, block, broken = Image.Exif(), None, b"", False
    with warnings.catch_warnings(record=True) as skipped:  # Pillow warns of each tag that it cannot read
        warnings.simplefilter("always")
        try:
            exif = image.getexif()
            orientation = exif.get(0x0112)  # from XMP, too
            block = image.info.get("exif") or b""
            if block:  # read again: Pillow warns only at the first reading
                exif = Image.Exif()
                exif.load(block)
        except DECODER_ERRORS:
            broken = True
        main, detail, gps = (_tags(exif, directory) for directory in (None, 0x8769, 0x8825))
    lost = (len(block) > EMPTY_EXIF and not main) or (0x8769 in main and not detail)
    try:
        iptc = IptcImagePlugin.getiptcinfo(image) or {}
    except DECODER_ERRORS:
        iptc = {}
    xmp = image.info.get("xmp", b"")
    turn = orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1
    xmp = xmp if isinstance(xmp, bytes) else b""
    return read_exif(main, detail, gps, xmp=xmp, iptc=iptc, damaged=broken or bool(skipped) or lost), turn


def _tags(exif: Image.Exif, directory: int | None) -> dict[int, object]:
    """The tags of a directory that can be read; of the main one if `directory` is None."""
    tags: dict[int, object] = {}
    try:
        source = exif if directory is None else exif.get_ifd(directory)
    except DECODER_ERRORS:
        return tags
    for tag in list(source):
        try:
            tags[tag] = source[tag]
        except DECODER_ERRORS:
            continue
    return tags


def _eight_bits(image: Image.Image) -> Image.Image:
    """A mode that resizes and converts well: L, RGB, RGBA or CMYK, eight bits a channel."""
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((wide >> 8).astype(np.uint8), "L")
    if image.mode in ("LA", "La", "PA", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        return image.convert("RGBA")
    if image.mode in ("RGB", "L") and "transparency" in image.info:
        return image.convert("RGBA")
    return image if image.mode in ("L", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Apply an embedded colour profile, lay transparency over white, and end in RGB."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colour = image.convert("RGB") if alpha is not None else image
    converted = None
    if profile:
        try:
            converted = ImageCms.applyTransform(colour, _to_srgb(profile, colour.mode))
        except (ImageCms.PyCMSError, *DECODER_ERRORS):
            converted = None  # a broken profile, or one for another colour space: take the values as sRGB
    result = converted if converted is not None else colour.convert("RGB")
    if alpha is not None:
        white = Image.new("RGB", result.size, (255, 255, 255))
        white.paste(result, mask=alpha)
        return white
    return result


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Building a transform takes as long as decoding; a camera writes the same profile into every photo."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return ImageCms.buildTransform(source, _SRGB, mode, "RGB")


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """Antialiased shrinking to at most `longest_side` pixels; smaller pictures come back as they are.

    Args:
        pixels: uint8, shape (h, w, 3).
        longest_side: Pixels, >= 1.
    """
    height, width = pixels.shape[:2]
    if max(height, width) <= longest_side:
        return pixels
    size = _shrunk_size(width, height, longest_side)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def cut_square(pixels: np.ndarray, corners: np.ndarray, size: int) -> np.ndarray:
    """Cut a rotated square out of a picture, as FFHQ does: shrink, continue beyond the border, resample.

    Args:
        pixels: uint8, shape (h, w, 3).
        corners: Upper left, lower left, lower right, upper right as the crop sees them; shape (4, 2), x and y
            in pixels, where (0, 0) is the centre of the first pixel.
        size: Side of the result in pixels, >= 1.

    Returns:
        uint8, shape (size, size, 3). What lies outside the picture is its mirror image, blurred and fading
        into the median colour, so that no second pair of eyes is learnt.
    """
    quad = corners.astype(np.float64) + 0.5
    side = float(np.hypot(*(quad[3] - quad[0])))
    factor = int(side / size * 0.5)
    picture = pixels
    if factor > 1:
        height, width = (max(1, round(length / factor)) for length in pixels.shape[:2])
        quad = quad * np.array([width / pixels.shape[1], height / pixels.shape[0]])
        picture = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
        side /= factor
    margin = max(round(side * 0.1), 3)
    low = np.floor(quad.min(axis=0)).astype(int) - margin
    high = np.ceil(quad.max(axis=0)).astype(int) + margin
    window = Image.fromarray(_continued(picture, low, high, side))
    fine = min(4 * size, 4096)
    data = [float(number) for number in (quad - low).reshape(-1)]
    cut = window.transform((fine, fine), Image.Transform.QUAD, data, Image.Resampling.BILINEAR)
    return np.array(cut.resize((size, size), Image.Resampling.LANCZOS))


def _continued(picture: np.ndarray, low: np.ndarray, high: np.ndarray, side: float) -> np.ndarray:
    """The window low..high (x, y) of a picture, softly continued where it reaches beyond (FFHQ's recipe)."""
    height, width = picture.shape[:2]
    rows, columns = _mirrored(low[1], high[1], height), _mirrored(low[0], high[0], width)
    window = np.ascontiguousarray(picture[rows][:, columns])
    if (low >= 0).all() and high[0] <= width and high[1] <= height:
        return window
    across = _depth(low[0], high[0], width, 0.3 * side)[None, :, None]
    down = _depth(low[1], high[1], height, 0.3 * side)[:, None, None]
    depth = np.maximum(across, down)  # 0 on the border, 1 where only the median colour is left, < 0 inside
    blurred = Image.fromarray(window).filter(ImageFilter.GaussianBlur(0.02 * side))
    soft = window + (np.asarray(blurred, dtype=np.float32) - window) * (3.0 * depth + 1.0).clip(0.0, 1.0)
    soft += (np.median(soft, axis=(0, 1)) - soft) * depth.clip(0.0, 1.0)
    return np.asarray(np.rint(soft).clip(0, 255), dtype=np.uint8)


def _depth(low: int, high: int, length: int, reach: float) -> np.ndarray:
    """How far beyond the picture 0..length-1 each of low..high-1 lies, in shares of the way to the median."""
    place = np.arange(low, high, dtype=np.float32)
    depth = np.full(len(place), -1.0, dtype=np.float32)
    if low < 0:
        depth = np.maximum(depth, -place / max(-low, reach))
    if high > length:
        depth = np.maximum(depth, (place - (length - 1)) / max(high - length, reach))
    return depth


def _mirrored(low: int, high: int, length: int) -> np.ndarray:
    """Row numbers low..high-1, reflected at both borders of 0..length-1 without repeating the border."""
    period = max(2 * (length - 1), 1)
    place = np.arange(low, high) % period
    return np.minimum(place, period - place) if length > 1 else np.zeros(high - low, dtype=int)


def png_bytes(pixels: np.ndarray, *, software: str | None = None) -> bytes:
    """A PNG file of uint8 pixels, shape (h, w, 3) or (h, w), without any metadata but the software that made it."""
    buffer, text = io.BytesIO(), PngImagePlugin.PngInfo()
    if software is not None:
        text.add_text("Software", software)
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", optimize=True, pnginfo=text)
    return buffer.getvalue()
