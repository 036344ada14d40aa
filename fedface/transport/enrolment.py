"""What a device fetches from its server before it is registered, and how it is registered by an invitation.

Nothing of a server is trusted before its authority is the one of the invitation: a certificate that proves itself.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import ssl
from dataclasses import dataclass
from http.client import HTTPException, HTTPSConnection

from fedface.codec import CodecError, read_json
from fedface.errors import ConfigError, FederationError
from fedface.messages.run_plan import MAX_BYTES, SignedPlan
from fedface.text import host_and_port

TIMEOUT = 15.0  # seconds without a byte from the server
MAX_ANSWER = MAX_BYTES + 1000


def fetch_authority(address: str, fingerprint: bytes) -> str:
    """The certificate of a server's authority, PEM.

    Args:
        address: HOST:PORT; no certificate is checked for this request.
        fingerprint: SHA-256 of the certificate in DER, 32 bytes: all that the certificate is trusted for.

    Raises:
        FederationError: The server cannot be reached, or has another authority.
    """
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    status, answer = _request(address, unverified, "GET", "/join/ca.crt")
    try:
        certificate = ssl.PEM_cert_to_DER_cert(answer.decode())
    except ValueError:
        certificate = b""
    if status != 200 or not certificate:
        raise FederationError(
            f"{address} has no certificate for devices (HTTP status {status}); ask the server's operator whether this "
            "address is right"
        )
    if not hmac.compare_digest(hashlib.sha256(certificate).digest(), fingerprint):
        raise FederationError(
            f"{address} is not the server of this invitation: its certificate is another one; nothing was sent. Ask "
            "the server's operator for a new invitation, in person or by telephone"
        )
    return ssl.DER_cert_to_PEM_cert(certificate)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that proves itself with a certificate of its authority."""

    address: str  # HOST:PORT
    authority: str  # certificate, PEM

    def fetch_plan(self, plan_hash: str, operator: bytes) -> SignedPlan:
        """The run plan of a hash, 64 hexadecimal digits, signed by the operator's public key.

        Raises:
            FederationError: The server cannot be reached, is another one, or has no such plan.
            ConfigError: It sent another plan, or somebody else signed it.
        """
        status, answer = self._request("GET", f"/join/plans/{plan_hash}.plan")
        if status != 200:
            raise FederationError(
                f"{self.address} has no run plan {plan_hash} (HTTP status {status}); ask the server's operator"
            )
        signed = SignedPlan.from_bytes(answer, operator)
        if signed.hash != plan_hash:
            raise ConfigError(f"{self.address} sent the run plan {signed.hash} instead of {plan_hash}")
        return signed

    def enrol(self, token: bytes, public_key: str) -> str:
        """Register a device's public key by the token of its invitation; returns the operator's name for the device.

        The same token and key may be sent again.

        Raises:
            FederationError: The server cannot be reached, is another one, or refuses.
        """
        body = json.dumps({"token": token.hex(), "public_key": public_key}).encode()
        status, answer = self._request("POST", "/join/enrol", body)
        try:
            said = read_json(answer.decode())
        except (CodecError, UnicodeDecodeError):
            said = {}
        device, error = (said.get("device"), said.get("error")) if isinstance(said, dict) else (None, None)
        if status == 200 and isinstance(device, str):
            return device
        reason = error if isinstance(error, str) else f"HTTP status {status}"
        raise FederationError(f"{self.address} does not register this device: {reason:.300}")

    def _request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        return _request(self.address, ssl.create_default_context(cadata=self.authority), method, path, body)


def _request(
    address: str, context: ssl.SSLContext, method: str, path: str, body: bytes | None = None
) -> tuple[int, bytes]:
    """The status and at most `MAX_ANSWER` bytes of an answer; redirections are not followed."""
    connection = HTTPSConnection(*host_and_port(address), context=context, timeout=TIMEOUT)
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER)
    except ssl.SSLCertVerificationError as error:
        raise FederationError(
            f"{address} does not prove that it is the server of this invitation ({error.verify_message}); nothing was "
            "sent"
        ) from error
    except (OSError, OverflowError, HTTPException, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FederationError(
            f"{address} cannot be reached ({reason}); check the network, or try again later"
        ) from error
    finally:
        connection.close()
