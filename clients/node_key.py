"""Generate the key by which a server recognises a device that has no invitation.

Usage: `python clients/node_key.py PATH`. Writes the private key to PATH, which never leaves the
device, and the public one to PATH.pub, which the server's operator registers. `fedface device join` does it by itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fedface.atomic_io import create_bytes
from fedface.device.node_key import node_public_key

if __name__ == "__main__":
    path = Path(sys.argv[1])
    create_bytes(path.with_name(f"{path.name}.pub"), node_public_key(path).encode() + b"\n", mode=0o644)
    print(f"send {path}.pub to the server's operator; {path} stays here")
