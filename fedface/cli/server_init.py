"""The command `fedface server init`: certificates, a secret, and a reverse proxy that lets only devices in.

SuperLink serves the devices (/v1/fleet/) and its operator (/v1/control/, without a password) at one port. So it listens
on this machine alone, and nginx passes the devices' paths from outside. Certificates follow RFC 5280; the curve is NIST
P-384.
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedface.atomic_io import create_bytes
from fedface.cli.console import say
from fedface.config import dump
from fedface.errors import ConfigError

PORTS_FILE = "ports.yaml"
Key = ec.EllipticCurvePrivateKey

PROXY = """\
# Lets devices reach Flower's fleet API and nothing else; written by `fedface server init`.
# Start: nginx -p FOLDER -c nginx.conf, with the folder of this file.
pid nginx.pid;
error_log nginx-error.log;
events {}
http {
  access_log nginx-access.log;
  client_body_temp_path nginx-unused;
  proxy_temp_path nginx-unused;
  fastcgi_temp_path nginx-unused;
  uwsgi_temp_path nginx-unused;
  scgi_temp_path nginx-unused;
  server_tokens off;
  client_max_body_size 64m;  # messages travel in parts of 5 MB
  server {
    listen PORT ssl;
    ssl_certificate certificates/server.crt;
    ssl_certificate_key certificates/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    location ~ ^/v1/fleet/[a-z-]+$ {
      limit_except POST { deny all; }
      proxy_pass https://127.0.0.1:SUPERLINK$uri;  # $uri: the path as it was matched, not as it was sent
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate certificates/ca.crt;
      proxy_ssl_name localhost;
      proxy_http_version 1.1;
      proxy_request_buffering off;  # messages pass without a temporary file
      proxy_buffering off;
      proxy_read_timeout 300s;
    }
    location / { return 403; }
  }
}
"""


@dataclass(frozen=True, kw_only=True)
class Ports:
    """The TCP ports of a server."""

    devices: int  # of nginx
    superlink: int  # on this machine alone


def server_init(folder: Path, hosts: list[str], port: int, superlink_port: int) -> None:
    """Write what a server needs into a new folder.

    Args:
        folder: New or empty.
        hosts: Names or addresses at which devices reach the server; the first is shown to them.
        port: TCP port of the proxy, for devices.
        superlink_port: TCP port of SuperLink, on this machine alone.

    Raises:
        ConfigError: The folder contains something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty, and nothing in it is replaced; name a new folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_certificates(folder / "certificates", hosts)
    create_bytes(folder / "superexec.secret", secrets.token_hex(32).encode())
    ports = Ports(devices=port, superlink=superlink_port)
    create_bytes(folder / PORTS_FILE, dump(ports).encode(), mode=0o644)
    proxy = PROXY.replace("PORT", str(port)).replace("SUPERLINK", str(superlink_port))
    create_bytes(folder / "nginx.conf", proxy.encode(), mode=0o644)
    say(f"wrote certificates, {PORTS_FILE}, superexec.secret and nginx.conf to {folder}")
    say(f"give each owner {folder / 'certificates' / 'ca.crt'} and the address {hosts[0]}:{port}")
    say(
        f"move {folder / 'certificates' / 'ca.key'} off this machine: whoever has it can impersonate the server"
    )


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
