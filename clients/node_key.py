"""Generate the key by which a server recognises a device.

Usage: `python clients/node_key.py PATH`. Writes the private key to PATH, which never leaves the
device, and the public one to PATH.pub, which the server's operator registers. This key does not decrypt sums, which
have another key. The same as `ssh-keygen -t ecdsa -b 384 -N "" -f PATH`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedface.atomic_io import create_bytes
from fedface.errors import ConfigError


def make_node_key(path: Path) -> None:
    """Write the key pair in OpenSSH's format; the private key is readable only by its owner.

    Raises:
        ConfigError: A key exists at this path.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    for place, content, mode in (
        (path, private, 0o600),
        (path.with_name(path.name + ".pub"), public + b"\n", 0o644),
    ):
        create_bytes(place, content, mode=mode)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Generate the key by which a server recognises this device.")
    parser.add_argument("path", type=Path, help="the private key's file; the public one gets .pub")
    given = parser.parse_args()
    try:
        make_node_key(given.path)
    except ConfigError as error:
        parser.error(str(error))
    print(f"send {given.path}.pub to the server's operator; {given.path} stays here")


if __name__ == "__main__":
    main()
