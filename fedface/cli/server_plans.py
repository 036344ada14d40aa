"""The commands `fedface server publish` and `invite`: signed run plans, and invitations that enrol one device each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives import hashes

from fedface.atomic_io import create_bytes, replace_bytes, replace_text
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
from fedface.number_format import counted


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
    say(f"give owners this hash; they admit it with: fedface device admit {signed.hash}")


def server_invite(
    folder: Path,
    devices: Sequence[str],
    run: RunRequest,
    *,
    days: int,
    qr: bool,
    table: Path | None,
) -> None:
    """Invite devices: print for each a code that enrols it once, or write all codes to a new CSV file.

    Raises:
        ConfigError: A name is invalid, repeated or a registered device's, the file exists, or as for `publish`.
    """
    _check_names(folder, devices)
    signed = publish(folder, run)
    certificate = read_certificate(folder / "certificates/ca.crt")
    expires = datetime.now(UTC) + timedelta(days=days)
    invites = {
        device: Invite(
            address=read_ports(folder).address,
            authority=certificate.fingerprint(hashes.SHA256()),
            operator=operator_key(folder).public_key().public_bytes_raw(),
            plan=bytes.fromhex(signed.hash),
            token=secrets.token_bytes(16),
        )
        for device in devices
    }
    if table is not None:
        rows = [f"{device},{invite.code()},{expires:%Y-%m-%d}\n" for device, invite in invites.items()]
        create_bytes(table, "".join(["device,code,expires\n", *rows]).encode())
    _replace_records(folder, invites, expires)
    valid = f"valid once and until {expires:%Y-%m-%d}"
    if table is not None:
        say(f"{counted(len(invites), 'invitation')} to {signed.plan.name} in {table}, each {valid}.")
        say("Give each owner the code of their device alone; they run: fedface device join CODE")
        return
    for device, invite in invites.items():
        say(f"Invitation of device {device} to {signed.plan.name}, {valid}.")
        say("Give it to the device's owner alone, who runs: fedface device join CODE")
        print(f"\n{invite.code()}\n")
        if qr:
            _print_qr(invite.code())


def _check_names(folder: Path, devices: Sequence[str]) -> None:
    """Raise ConfigError unless every device can be invited; one that was revoked can be."""
    registered = {known.name.casefold() for known in read_devices(folder)}
    states: dict[str, str | None] = {}
    if registered & {device.casefold() for device in devices}:
        states = {str(row["name"]).casefold(): row["state"] for row in device_rows(folder)}
    seen = set()
    for device in devices:
        if not NAME.fullmatch(device):
            raise ConfigError(
                f"device: expected a name of letters, digits, '-', '_' and '.', 80 at most, got {device!r:.90}"
            )
        key = device.casefold()
        if key in seen:
            raise ConfigError(f"device: the name {device} is twice in the list; no device was invited")
        if key in registered and states.get(key) != "revoked":
            raise ConfigError(f"a device {device} is registered already; choose another name, or revoke it")
        seen.add(key)


def _replace_records(folder: Path, invites: Mapping[str, Invite], expires: datetime) -> None:
    """Store the new invitations, and remove the earlier ones of the same devices."""
    names = {device.casefold() for device in invites}
    for path, known in open_invites(folder).items():
        if known.device.casefold() in names:
            path.unlink()
            say(f"the earlier invitation of {known.device} is no longer valid")
    for device, invite in invites.items():
        record = InviteRecord(device=device, expires=expires.isoformat(timespec="seconds"))
        replace_text(folder / INVITES / f"{invite.token_hash}.json", dumps(record))


def _print_qr(code: str) -> None:
    """As text of half blocks, where the package segno is installed."""
    try:
        import segno
    except ImportError:
        say("for a QR code: pip install segno")
        return
    segno.make(code, error="m", boost_error=False).terminal(compact=True)
