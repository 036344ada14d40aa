"""An invitation: what a device needs to find a server, to trust it, and to enrol its key once."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass

from fedface.errors import ConfigError

PREFIX = "FEDFACE1"
_HASH, _TOKEN, _CHECK = 32, 16, 4  # bytes


@dataclass(frozen=True, kw_only=True)
class Invite:
    """One device's invitation; it is as secret as a password until it is used."""

    address: str  # HOST:PORT
    authority: bytes  # SHA-256 of the certificate of the server's authority in DER, 32 bytes
    operator: bytes  # Ed25519 public key that signs run plans, 32 bytes
    plan: bytes  # hash of the run plan, 32 bytes
    token: bytes  # to enrol once, 16 random bytes

    def code(self) -> str:
        """Capital letters and digits (RFC 4648, Base32) with a check against typing errors, such as FEDFACE1-ABCD..."""
        content = self.authority + self.operator + self.plan + self.token + self.address.encode()
        coded = base64.b32encode(content + _check(content)).decode().rstrip("=")
        return f"{PREFIX}-{coded}"

    @classmethod
    def from_code(cls, text: str) -> Invite:
        """Inverse of `code`; spaces, line breaks and the case of letters do not matter.

        Raises:
            ConfigError: It is not an invitation, or a part is missing or mistyped.
        """
        found = re.fullmatch(rf"{PREFIX}-([A-Z2-7]+)", re.sub(r"\s", "", text).upper())
        if found is None:
            raise ConfigError(
                f"expected an invitation, {PREFIX}-... from the operator of a server, got {text!r:.60}"
            )
        try:
            content = base64.b32decode(found[1] + "=" * (-len(found[1]) % 8))
            content, check = content[:-_CHECK], content[-_CHECK:]
            address = content[3 * _HASH + _TOKEN :].decode()
        except ValueError:
            content, check, address = b"", b"?", ""
        if check != _check(content) or not address:
            raise ConfigError("this invitation is incomplete or mistyped: copy all of it again")
        return cls(
            address=address,
            authority=content[:_HASH],
            operator=content[_HASH : 2 * _HASH],
            plan=content[2 * _HASH : 3 * _HASH],
            token=content[3 * _HASH : 3 * _HASH + _TOKEN],
        )

    @property
    def token_hash(self) -> str:
        """SHA-256 of the token, 64 hexadecimal digits: what the server stores."""
        return hashlib.sha256(self.token).hexdigest()


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECK]
