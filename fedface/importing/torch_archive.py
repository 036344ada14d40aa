"""The two formats of torch.save, read without unpickling into classes.

The newer format is a zip file with one pickle and one uncompressed entry per storage; the older one is a
pickle followed by the storages. In both, the pickle refers to a storage by a persistent id.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from fedface.importing.safe_pickle import Budget, PickledGlobal, PickleRefused, check_name, read_pickle
from fedface.text import sanitize_text

TORCH_MAGIC: Final = 0x1950A86A20F9469CFC6C  # the first value of the older format
MAX_SIZE: Final = 4 * 2**30  # bytes of a file; the largest published training checkpoint has about 1 GiB
_MAX_DIRECTORY: Final = 2**20  # bytes of a zip file's list of entries, which is about ten thousand entries
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


@dataclass(slots=True, eq=False)
class Storage:
    """The numbers of one or more tensors, which are views of it."""

    dtype: torch.dtype
    numel: int
    values: Tensor | None = None  # None until the bytes after the pickle are read

    def fill(self, content: bytes) -> None:
        """Read the numbers from their bytes; raises PickleRefused if there are more or fewer than declared."""
        expected = self.numel * self.dtype.itemsize
        if len(content) != expected:
            raise PickleRefused(f"is damaged: a storage has {len(content)} bytes and not {expected}")
        self.values = torch.frombuffer(bytearray(content), dtype=self.dtype) if expected else torch.empty(0)


def read_storages(stream: Any, budget: Budget) -> Any:
    """The older format of torch.save behind its magic number: a pickle, then the storages it refers to.

    Raises:
        PickleRefused: As `read_pickle`, or a storage is missing, truncated or declared twice.
    """
    storages: dict[str, Storage] = {}
    if read_pickle(stream, budget) != 1001:
        raise PickleRefused("is of a version of torch.save that is not supported")
    system = read_pickle(stream, budget)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleRefused("was written on a machine with another order of bytes")
    value = read_pickle(stream, budget, persistent=lambda key: _named_storage(key, storages))
    keys = read_pickle(stream, budget)
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise PickleRefused("is damaged: its list of storages is not one")
    for key in dict.fromkeys(keys):
        storage = storages[key]
        (numel,) = struct.unpack("<q", _exactly(stream, 8))
        if numel != storage.numel:
            raise PickleRefused(f"is damaged: a storage of {storage.numel} numbers declares {numel}")
        storage.fill(_exactly(stream, numel * storage.dtype.itemsize))
    return value


def _exactly(stream: Any, count: int) -> bytes:
    content: bytes = stream.read(count)
    if len(content) != count:
        raise PickleRefused(f"is cut short: expected {count} bytes, got {len(content)}")
    return content


def _named_storage(key: Any, storages: dict[str, Storage]) -> Storage:
    """What torch.save's persistent ids stand for: ("storage", type, key, device, count[, view])."""
    if not (
        isinstance(key, tuple)
        and len(key) in (5, 6)
        and key[0] == "storage"
        and isinstance(key[1], PickledGlobal)
    ):
        raise PickleRefused("has a persistent id that is not a storage")
    kind, name, count = key[1], key[2], key[4]
    dtype = _DTYPES.get(kind.name)
    if dtype is None or not isinstance(name, str) or not isinstance(count, int) or not 0 <= count < MAX_SIZE:
        raise PickleRefused("has a persistent id that is not a storage")
    if key[5:] not in ((), (None,)):
        raise PickleRefused("has storages that are views of others, an obsolete format")
    storage = storages.setdefault(check_name(name), Storage(dtype, count))
    if (storage.dtype, storage.numel) != (dtype, count):
        raise PickleRefused(f"declares one storage twice, differently ({sanitize_text(name)})")
    return storage


def read_zip(file: Any, size: int, budget: Budget) -> Any:
    """The newer format of torch.save: a zip file with data.pkl and one uncompressed entry per storage.

    Args:
        file: Open for reading bytes.
        size: Its length in bytes.
        budget: Of the file.

    Raises:
        PickleRefused: As `read_pickle`, or the zip file is damaged, compressed, or larger inside than outside.
    """
    _check_directory(file, size)
    storages: dict[str, Storage] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            folder = _checked_folder(archive, size)
            value = read_pickle(
                io.BytesIO(archive.read(f"{folder}data.pkl")),
                budget,
                persistent=lambda key: _named_storage(key, storages),
            )
            for name, storage in storages.items():
                storage.fill(archive.read(f"{folder}data/{name}"))
    except (zipfile.BadZipFile, KeyError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise PickleRefused(f"is a damaged zip file ({sanitize_text(str(error))})") from error
    return value


def _checked_folder(archive: zipfile.ZipFile, size: int) -> str:
    """The folder within the zip file that torch.save wrote, after looking at every entry."""
    entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise PickleRefused("is a compressed zip file, and torch.save does not compress: unpack it first")
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
        raise PickleRefused("is a zip file whose parts are together larger than itself")
    names = {entry.filename for entry in entries}
    main = [name for name in names if name.endswith("data.pkl")]
    if len(main) != 1 or len(names) != len(entries):
        raise PickleRefused(
            "is a zip file, but not one that torch.save wrote: unpack it first if weights are in it"
        )
    folder = main[0].removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in names and archive.read(order) != b"little":
        raise PickleRefused("was written on a machine with another order of bytes")
    return folder


def _check_directory(file: Any, size: int) -> None:
    """Refuse a zip file whose list of entries would fill memory: `zipfile` reads it whole."""
    file.seek(max(0, size - 2**16 - 128))
    tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0 or place + 22 > len(tail):
        raise PickleRefused("is cut short: a zip file ends with a list of its parts")
    listed = int.from_bytes(tail[place + 12 : place + 16], "little")
    wide = tail.rfind(b"PK\x06\x06", 0, place)
    if wide >= 0:
        long = int.from_bytes(tail[wide + 40 : wide + 48], "little")
        listed = long if listed == 0xFFFFFFFF else max(long, listed)
    if listed > _MAX_DIRECTORY:
        raise PickleRefused("is a zip file with more parts than any network has")
    file.seek(0)
