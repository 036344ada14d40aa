"""The command `fedface server init`: certificates, a secret, and a reverse proxy that lets only devices in.

SuperLink serves the devices (/v1/fleet/) and its operator (/v1/control/, without a password) at one port. So it listens
on this machine alone, and nginx passes the devices' paths from outside.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from fedface.atomic_io import create_bytes
from fedface.cli.console import say
from fedface.cli.server_certificates import make_certificates
from fedface.cli.server_flower import PORTS_FILE, Ports, write_config
from fedface.cli.server_invites import init_plan_files
from fedface.config import dump
from fedface.errors import ConfigError

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
  limit_req_zone $binary_remote_addr zone=enrolment:1m rate=1r/s;
  server {
    listen LISTEN:DEVICES ssl;
    ssl_certificate certificates/server.crt;
    ssl_certificate_key certificates/server.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    location ~ ^/v1/fleet/[a-z-]+$ {
      access_log off;  # each device asks twenty times a minute
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
    location ~ ^/join/(ca[.]crt|plans/[0-9a-f]+[.]plan|enrol)$ {
      limit_except GET POST { deny all; }
      client_max_body_size 4k;
      limit_req zone=enrolment burst=20;
      proxy_pass http://127.0.0.1:ENROLMENT$uri;
    }
    location / { return 403; }
  }
}
"""


def server_init(folder: Path, ports: Ports, hosts: list[str]) -> None:
    """Write what a server needs into a new folder.

    Args:
        folder: New or empty.
        ports: With the first of the hosts.
        hosts: Names or addresses at which devices reach the server.

    Raises:
        ConfigError: The folder contains something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is not empty, and nothing in it is replaced; name a new folder")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    make_certificates(folder / "certificates", hosts)
    create_bytes(folder / "superexec.secret", secrets.token_hex(32).encode())
    init_plan_files(folder)
    create_bytes(folder / PORTS_FILE, dump(ports).encode(), mode=0o644)
    proxy = PROXY
    for word in ("LISTEN", "DEVICES", "SUPERLINK", "ENROLMENT"):
        proxy = proxy.replace(word, str(getattr(ports, word.lower())))
    create_bytes(folder / "nginx.conf", proxy.encode(), mode=0o644)
    write_config(folder)
    say(f"wrote certificates, keys, {PORTS_FILE}, nginx.conf and flwr/config.toml to {folder}")
    say(f"devices will reach it at {ports.address}; start it with: fedface server up {folder}")
    say(
        f"move {folder / 'certificates' / 'ca.key'} off this machine: whoever has it can impersonate the server"
    )
