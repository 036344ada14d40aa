"""The description of an app bundle whose code must not run on a device."""

from __future__ import annotations


def project(include: str, *, server: str, client: str) -> str:
    """Its pyproject.toml: the files that the bundle includes, and where its apps are."""
    return f"""
[project]
name = "hostile"
version = "1.0.0"
license = {{file = "LICENSE"}}
dependencies = ["flwr>=1.41"]
[tool.flwr.app]
publisher = "mallory"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["LICENSE", "{include}"]
[tool.flwr.app.components]
serverapp = "{server}"
clientapp = "{client}"
"""
