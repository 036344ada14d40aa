"""The key by which a server recognises a device: ECDSA on NIST P-384, in OpenSSH's format. It does not decrypt sums."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedface.atomic_io import create_bytes
from fedface.errors import ConfigError


def node_public_key(path: Path) -> str:
    """The public key of a device as one line of OpenSSH's format; its private key is generated where there is none.

    The same as `ssh-keygen -t ecdsa -b 384 -N "" -f PATH`.

    Raises:
        ConfigError: The file is not such a private key.
    """
    if not path.exists():
        private = ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        create_bytes(path, private)
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path}: expected a private key in OpenSSH's format ({error})") from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()


def key_name(public_key: str) -> str:
    """A short name of a public key in OpenSSH's format without a comment: 16 hexadecimal digits."""
    return hashlib.sha256(public_key.encode()).hexdigest()[:16]
