"""The commands `fedface server publish` and `invite`: signed run plans, and invitations that enrol one device each."""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes

from fedface.atomic_io import replace_bytes, replace_text
from fedface.cli.console import say
from fedface.cli.options import RunRequest
from fedface.cli.server_certificates import read_certificate
from fedface.cli.server_devices import NAME, device_rows, read_devices
from fedface.cli.server_flower import read_ports
from fedface.cli.server_invites import INVITES, PLANS, InviteRecord, open_invites, operator_key
from fedface.codec import dumps
from fedface.coordinator.model_ranking import load_candidates, ranking_plan
from fedface.coordinator.requests import run_plan
from fedface.device.config import check_kind
from fedface.errors import ConfigError
from fedface.experiment import Experiment, RemoteDevices, for_ranking, read_experiment
from fedface.messages.invite import Invite
from fedface.messages.run_plan import RunPlan, SignedPlan


def read_plan(run: RunRequest) -> tuple[Experiment, RunPlan]:
    """The experiment of a run and the run's plan.

    Raises:
        ConfigError: The experiment cannot be read or is not for remote devices, or a candidate is invalid.
        WeightsError: A model cannot be read.
        PrivacyError: No amount of noise meets the privacy target.
    """
    check_kind(run.experiment, "experiment")
    recipe = read_experiment(run.experiment, photos=run.photos, changes=run.changes)
    if not isinstance(recipe.devices, RemoteDevices):
        raise ConfigError(
            f"{run.experiment}: devices: expected remote-devices; `fedface run` simulates others"
        )
    if not run.candidates:
        return recipe, run_plan(recipe)
    ranked = for_ranking(recipe)
    return recipe, ranking_plan(ranked, list(load_candidates(run.candidates, ranked).values()))


def publish(folder: Path, run: RunRequest) -> SignedPlan:
    """Sign the plan of a run, and store it where devices can fetch it.

    Raises:
        FedfaceError: The folder is not a server's, or as for `read_plan`.
    """
    read_ports(folder)
    return publish_plan(folder, read_plan(run)[1])


def publish_plan(folder: Path, plan: RunPlan) -> SignedPlan:
    """Sign a plan, and store it where devices can fetch it; the same plan has the same file."""
    signed = plan.signed(operator_key(folder))
    replace_bytes(folder / PLANS / f"{signed.hash}.plan", signed.to_bytes(), mode=0o644)
    return signed


def server_publish(folder: Path, run: RunRequest) -> None:
    """Publish a plan, and say what owners do with its hash."""
    signed = publish(folder, run)
    say(f"published the run plan of {signed.plan.name}: {signed.hash}")
    say(f"give owners this hash; they admit it with: fedface device admit device.yaml {signed.hash}")


def server_invite(folder: Path, device: str, run: RunRequest, *, days: int, qr: bool) -> None:
    """Invite one device: print a code that enrols it once.

    Raises:
        ConfigError: The name is invalid or a registered device's, or as for `publish`.
    """
    if not NAME.fullmatch(device):
        raise ConfigError(
            f"device: expected a name of letters, digits, '-', '_' and '.', 80 at most, got {device!r:.90}"
        )
    _check_free(folder, device)
    signed = publish(folder, run)
    certificate = read_certificate(folder / "certificates/ca.crt")
    invite = Invite(
        address=read_ports(folder).address,
        authority=certificate.fingerprint(hashes.SHA256()),
        operator=operator_key(folder).public_key().public_bytes_raw(),
        plan=bytes.fromhex(signed.hash),
        token=secrets.token_bytes(16),
    )
    for path, known in open_invites(folder).items():
        if known.device.casefold() == device.casefold():
            path.unlink()
            say(f"the earlier invitation of {device} is no longer valid")
    expires = datetime.now(UTC) + timedelta(days=days)
    record = InviteRecord(device=device, expires=expires.isoformat(timespec="seconds"))
    replace_text(folder / INVITES / f"{invite.token_hash}.json", dumps(record))
    say(f"Invitation of device {device} to {signed.plan.name}, valid once and until {expires:%Y-%m-%d}.")
    say("Give it to the device's owner alone, who runs: fedface device join CODE")
    print(f"\n{invite.code()}\n")
    if qr:
        _print_qr(invite.code())


def _check_free(folder: Path, device: str) -> None:
    """Raise ConfigError if a device of this name is registered and was not revoked."""
    if any(known.name.casefold() == device.casefold() for known in read_devices(folder)):
        states = {str(row["name"]).casefold(): row["state"] for row in device_rows(folder)}
        if states.get(device.casefold()) != "revoked":
            raise ConfigError(f"a device {device} is registered already; choose another name, or revoke it")


def _print_qr(code: str) -> None:
    """As text of half blocks, where the package segno is installed."""
    try:
        import segno
    except ImportError:
        say("for a QR code: pip install segno")
        return
    segno.make(code, error="m", boost_error=False).terminal(compact=True)
