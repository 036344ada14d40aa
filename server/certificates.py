"""Generate the TLS certificates of a server.

Usage: `python server/certificates.py FOLDER HOST [HOST ...]`. Writes a certificate authority
(`ca.crt`, `ca.key`) and a server certificate that it signed (`server.crt`, `server.key`) for the hosts named,
`localhost` and `127.0.0.1`. Devices trust only `ca.crt`. Existing files are not replaced.
Certificates follow RFC 5280; the curve is NIST P-384.
"""

from __future__ import annotations

import argparse
import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedface.atomic_io import create_bytes
from fedface.errors import ConfigError

Key = ec.EllipticCurvePrivateKey


def make_certificates(folder: Path, hosts: list[str], *, days: int = 365) -> None:
    """Write the four files.

    Args:
        folder: For the files; created if missing.
        hosts: Names or addresses at which devices reach the server.
        days: Validity of the server's certificate, >= 1; the authority's is ten times as long.

    Raises:
        ConfigError: One of the files exists.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = _named("fedface authority")
    ours = _begun(issuer, issuer, authority, authority, 10 * days)
    ours = ours.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    ours = ours.add_extension(_usage(signs_certificates=True), critical=True)
    theirs = _begun(_named(hosts[0]), issuer, server, authority, days)
    theirs = theirs.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    theirs = theirs.add_extension(_usage(signs_certificates=False), critical=True)
    theirs = theirs.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    names = dict.fromkeys([*hosts, "localhost", "127.0.0.1"])
    theirs = theirs.add_extension(
        x509.SubjectAlternativeName([_host(name) for name in names]), critical=False
    )
    for name, key, certificate in (("ca", authority, ours), ("server", server, theirs)):
        create_bytes(folder / f"{name}.key", _pem(key))
        signed = certificate.sign(authority, hashes.SHA384())
        create_bytes(folder / f"{name}.crt", signed.public_bytes(serialization.Encoding.PEM), mode=0o644)


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
        return x509.DNSName(name)


def _pem(key: Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Make the certificates of a fedface server.")
    parser.add_argument("folder", type=Path, help="where ca.crt, ca.key, server.crt and server.key go")
    parser.add_argument("hosts", nargs="+", help="names or addresses under which devices reach the server")
    given = parser.parse_args()
    try:
        make_certificates(given.folder, given.hosts)
    except ConfigError as error:
        parser.error(str(error))
    print(f"give {given.folder / 'ca.crt'} to every device; keep {given.folder / 'ca.key'} off the network")


if __name__ == "__main__":
    main()
