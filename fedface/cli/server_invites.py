"""The files of a server's folder that run plans and invitations need: the operator's key, public files, invitations."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedface.atomic_io import create_bytes
from fedface.codec import load
from fedface.errors import ConfigError

OPERATOR_KEY = "operator.key"  # private, signs run plans
PUBLIC = "public"  # what everyone may fetch
PLANS = f"{PUBLIC}/plans"
INVITES = "invites"  # one file for each invitation, named after the hash of its token


@dataclass(frozen=True, kw_only=True)
class InviteRecord:
    """What a server stores of an invitation; the token itself is in the owner's hands alone."""

    version: ClassVar[int] = 1

    device: str  # the operator's name for the device
    expires: str  # ISO 8601, UTC
    public_key: str | None = None  # of the device that used it

    @property
    def is_expired(self) -> bool:
        return datetime.now(UTC) > datetime.fromisoformat(self.expires)


def init_plan_files(folder: Path) -> None:
    """Write the operator's key and the public folder into a new server's folder."""
    key = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    create_bytes(folder / OPERATOR_KEY, key)
    for name in (PUBLIC, PLANS):
        (folder / name).mkdir(mode=0o755)
    (folder / INVITES).mkdir(mode=0o700)
    create_bytes(folder / PUBLIC / "ca.crt", (folder / "certificates/ca.crt").read_bytes(), mode=0o644)


def open_invites(folder: Path) -> dict[Path, InviteRecord]:
    """The invitations that can still be used, by file."""
    records = {path: load(InviteRecord, path) for path in sorted((folder / INVITES).glob("*.json"))}
    return {
        path: known for path, known in records.items() if known.public_key is None and not known.is_expired
    }


def operator_key(folder: Path) -> Ed25519PrivateKey:
    """The key that signs run plans. Raises ConfigError if it is missing or another kind."""
    path = folder / OPERATOR_KEY
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected the operator's private key ({error})") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path}: expected an Ed25519 key")
    return key
