"""The TLS certificates of a server: an authority, which devices trust, and what it signs (RFC 5280, NIST P-384)."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedface.atomic_io import create_bytes, replace_bytes
from fedface.errors import ConfigError

Key = ec.EllipticCurvePrivateKey
HASH = hashes.SHA384()
DAYS = 365  # validity of a server's certificate; an authority's is ten times as long


def make_certificates(folder: Path, hosts: list[str]) -> None:
    """Write the four files.

    Args:
        folder: For the files; created if missing.
        hosts: Names or addresses at which devices reach the server.

    Raises:
        ConfigError: One of the files exists, or a host is no name.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = ec.generate_private_key(ec.SECP384R1())
    issuer = _named("fedface authority")
    ours = _begun(issuer, issuer, authority, authority, 10 * DAYS)
    ours = ours.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ours = ours.add_extension(_usage(signs_certificates=True), critical=True)
    names = [_host(name) for name in dict.fromkeys([*hosts, "localhost", "127.0.0.1"])]
    server, theirs = _server_certificate(hosts[0], names, authority)
    for name, key, certificate in (("ca", authority, ours.sign(authority, HASH)), ("server", server, theirs)):
        create_bytes(folder / f"{name}.key", _pem(key))
        create_bytes(folder / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def renew_certificate(folder: Path, authority_key: Path) -> datetime:
    """Replace the server's certificate and key by new ones for the same hosts, and return until when they are valid.

    Devices, which trust the authority, need nothing new.

    Args:
        folder: With `ca.crt`, `server.crt` and `server.key`.
        authority_key: The file `ca.key`.

    Raises:
        ConfigError: A file is missing or is not what its name says, or the key is not that of `ca.crt`.
    """
    authority, old = read_certificate(folder / "ca.crt"), read_certificate(folder / "server.crt")
    try:
        key = serialization.load_pem_private_key(authority_key.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{authority_key}: expected the authority's private key, ca.key ({error})"
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != authority.public_key():
        raise ConfigError(f"{authority_key}: is not the key of {folder / 'ca.crt'}")
    names = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    server, theirs = _server_certificate(str(names[0].value), names, key)
    replace_bytes(folder / "server.key", _pem(server), mode=0o600)
    replace_bytes(folder / "server.crt", theirs.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return theirs.not_valid_after_utc


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in PEM format. Raises ConfigError if the file is missing or something else."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a certificate in PEM format ({error})") from error


def _server_certificate(
    name: str, names: list[x509.GeneralName], authority: Key
) -> tuple[Key, x509.Certificate]:
    """A new key, and the certificate for these names."""
    key = ec.generate_private_key(ec.SECP384R1())
    begun = _begun(_named(name), _named("fedface authority"), key, authority, DAYS)
    begun = begun.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    begun = begun.add_extension(_usage(signs_certificates=False), critical=True)
    begun = begun.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    begun = begun.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return key, begun.sign(authority, HASH)


def _begun(
    subject: x509.Name, issuer: x509.Name, key: Key, authority: Key, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    issuer_key = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(issuer_key, critical=False)
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError(f"host: expected a name in ASCII or an address, got {name!r}") from error


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
