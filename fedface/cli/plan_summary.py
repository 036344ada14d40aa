"""What `fedface plan` prints: the privacy guarantee, the rounds, and what crosses the network, measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fedface import number_format
from fedface.aggregation.mask_graph import mask_graph
from fedface.aggregation.masked import EXCHANGES
from fedface.aggregation.masked import traffic as masked_traffic
from fedface.aggregation.payload import HomomorphicConfig, MaskSettings, fewest_summed
from fedface.aggregation.protocols import DeviceKeys, device_sum, make_keys, sum_ring
from fedface.experiment import EVALUATIONS, Experiment, LabelledDevices, RemoteDevices, SyntheticDevices
from fedface.models.checkpoint import flatten_parameters
from fedface.number_format import format_delta
from fedface.privacy.distributed_noise import DistributedNoise
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import NoPrivacy, PrivacyTarget
from fedface.public_data.device_photos import describe_devices
from fedface.tensor_types import Vector
from fedface.training.latent_prior import PriorTrainingConfig
from fedface.training.training_methods import common_streams, prepare_round

MAX_LISTED = 12  # devices; the report lists all
MAX_DELTA_SUM = 0.01  # delta times the units of a device; warn above it
NOISE_WARNING = 3.0  # warn where the noise is this many times as long as the sum of updates can be


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one device sends and receives, in numbers and bytes."""

    weights: int  # of the model
    numbers_up: int  # in one update
    bytes_up: int  # one protected update
    bytes_decrypted: int  # one decrypted sum from one device; 0 where no device decrypts
    metric_bytes_up: int  # one protected set of evaluation metrics; 0 without evaluation
    bytes_for_sum: int = 0  # received to reveal the sum of updates, where masks need it

    @property
    def bytes_down(self) -> int:
        """The weights in float32, and what reveals the sum."""
        return 4 * self.weights + self.bytes_for_sum


def measure_traffic(recipe: Experiment, plan: Plan) -> Traffic:
    """Protect one zero update and one zero set of metrics, and count the bytes.

    Raises:
        PrivacyError: Distributed noise does not fit masked sums.
    """
    model = recipe.start()
    weights = flatten_parameters(*model.modules())
    zeros = torch.zeros_like(
        prepare_round(model, recipe.training, plan.dp_parameters, common_streams(0, 1)).ranges()
    )
    metrics = None if recipe.evaluation is None else torch.zeros(recipe.evaluation.metrics.width)
    for dp, vector in ((plan.dp_parameters, zeros), (plan.evaluation, metrics)):
        if dp is not None and vector is not None:
            # It must fit sums of 32 bits.
            DistributedNoise.of(dp, len(vector), recipe.agreement.max_devices)
    up, down, decrypted = _sum_traffic(recipe, zeros)
    return Traffic(
        weights=len(weights),
        numbers_up=len(zeros),
        bytes_up=up,
        bytes_decrypted=decrypted,
        metric_bytes_up=0 if metrics is None else _sum_traffic(recipe, metrics)[0],
        bytes_for_sum=down,
    )


def _sum_traffic(recipe: Experiment, vector: Vector) -> tuple[int, int, int]:
    """Bytes that a device sends and receives for one sum, without those of the weights, and of a decrypted sum."""
    config, agreement = recipe.aggregation, recipe.agreement
    if not isinstance(config, MaskSettings):
        return device_sum(config, agreement, DeviceKeys()).protect(vector, 1).nbytes, 0, 0
    ring = sum_ring(config, agreement, make_keys(config, agreement))
    integers = ring.to_ring(vector)
    traffic = masked_traffic(config, recipe.devices.count, len(vector), len(ring.send(integers, len(vector))))
    return *traffic, len(ring.write(integers)) if isinstance(config, HomomorphicConfig) else 0


def plan_record(recipe: Experiment, plan: Plan, traffic: Traffic) -> dict[str, Any]:
    """The plan for `--json`."""
    epsilon = plan.epsilon()
    evaluation = {} if recipe.evaluation is None else {
        "metric_sets": EVALUATIONS,
        "numbers_up_per_metric_set": recipe.evaluation.metrics.width,
        "bytes_up_per_device_and_metric_set": traffic.metric_bytes_up,
    }  # fmt: skip
    return {
        "question": recipe.question,
        "noise_multiplier": plan.noise_multiplier,
        "schedule": asdict(plan.schedule),
        "epsilon": None if epsilon is None else asdict(epsilon),
        "privacy": asdict(recipe.privacy),
        "training": recipe.training.kind,
        "weights": traffic.weights,
        "numbers_up": traffic.numbers_up,
        "bytes_up_per_device_and_round": traffic.bytes_up,
        "bytes_down_per_device_and_round": traffic.bytes_down,
        "protocol": recipe.aggregation.kind,
        "bytes_decrypted_per_round": traffic.bytes_decrypted,
        **evaluation,
    }


def plan_lines(recipe: Experiment, plan: Plan, traffic: Traffic, *, list_devices: bool) -> Iterator[str]:
    """The plan for people, one line each.

    Args:
        list_devices: Say what each simulated device holds.
    """
    yield from plan.describe()
    if (warning := _noise_warning(plan, recipe.devices.count, traffic.numbers_up)) is not None:
        yield f"warning: {warning}"
    if (warning := _delta_warning(recipe)) is not None:
        yield f"warning: {warning}"
    yield f"devices: {recipe.devices.count}; at least {recipe.min_responses} must respond"
    if list_devices:
        devices = describe_devices(recipe)
        yield from _batch_size(recipe, plan, [count for _, _, count in devices])
        for name, mix, count in devices[:MAX_LISTED]:
            yield f"  {name}: {mix}, {_holding(recipe, count)}"
        if (more := len(devices) - MAX_LISTED) > 0:
            yield f"  and {more} more"
    yield (
        f"upload: one vector of {traffic.numbers_up:,} {recipe.training.describe_update()} per device and round, "
        f"{recipe.aggregation.kind}, {number_format.size(traffic.bytes_up)}"
    )
    if recipe.evaluation is not None:
        protection = (
            "clipped, without noise until the server adds noise to their sum"
            if plan.dp_parameters.noise == "central"
            else "clipped, noised and summed like updates"
        )
        yield (
            f"  and metrics of held-out photos: {number_format.counted(EVALUATIONS, 'set')} of "
            f"{recipe.evaluation.metrics.width:,} numbers per device over the run, {protection}, "
            f"{number_format.size(traffic.metric_bytes_up)} each"
        )
    if isinstance(recipe.aggregation, MaskSettings):
        yield from _mask_lines(recipe.aggregation, recipe.devices.count)
        if isinstance(recipe.aggregation, HomomorphicConfig):
            yield _key_line(recipe.aggregation)
        yield from _noise_lines(recipe, plan)
    if traffic.bytes_decrypted:
        yield (
            "  and, from one device with the secret key: each decrypted sum, still masked, "
            f"{number_format.size(traffic.bytes_decrypted)} per round"
        )
    yield f"stays on the device: {_stays(recipe)}"
    yield f"download: the weights, {number_format.size(traffic.bytes_down)} per device and round"


def _mask_lines(config: MaskSettings, devices: int) -> Iterator[str]:
    """What masked sums of so many devices survive, and what they assume."""
    graph = mask_graph(devices, corrupt_share=config.corrupt_share, dropout_share=config.dropout_share)
    yield (
        f"  masked: {len(EXCHANGES)} short exchanges after each round's training, each device with "
        f"{number_format.counted(graph.partners, 'partner')}; a sum survives "
        f"{number_format.counted(min(graph.dropouts, devices - config.min_devices), 'dropout')}"
    )
    secrecy, lost = graph.log2_secrecy_failure, graph.log2_correctness_failure
    failures = [
        f"{what} with probability at most 2^{log2:.0f}"
        for what, log2 in (("reveals more", secrecy), ("cannot be revealed", lost))
        if math.isfinite(log2)
    ]
    yield (
        "  no one reads one device's update, unless more than "
        f"{number_format.counted(graph.corrupt, 'device')} of these {devices} collude with the server, or the server "
        f"makes devices up{''.join(f'; a sum {failure}' for failure in failures)}"
    )


def _key_line(config: HomomorphicConfig) -> str:
    """Who can decrypt."""
    if config.public_key:
        return "  and encrypted with a public key: one device has the secret key; without it too no one reads an update"
    return "  and encrypted with a key that the devices share: whoever has no device does not read an update either"


def _noise_lines(recipe: Experiment, plan: Plan) -> Iterator[str]:
    """How much noise the sum has if all devices are in it, beside what the guarantee needs."""
    honest, devices = plan.honest_devices, recipe.devices.count
    if honest:
        fewest = fewest_summed(recipe.aggregation, devices)
        yield (
            f"  the sum of all {devices} has {devices / honest:.3g} times the noise variance that the guarantee needs, "
            f"since a sum may have only {fewest}, of which {honest} are taken to be honest (aggregation.min_devices, "
            "privacy.honest_fraction)"
        )


def can_list_devices(recipe: Experiment, *, photos_given: bool) -> bool:
    """Whether the simulated devices are known before the run."""
    match recipe.devices:
        case SyntheticDevices():
            return True
        case LabelledDevices():
            return photos_given
        case RemoteDevices():
            return False


def _noise_warning(plan: Plan, devices: int, numbers: int) -> str | None:
    """That the noise of a sum is much longer than the sum of updates can be."""
    dp = plan.dp_parameters
    ratio = dp.noise_multiplier * math.sqrt(dp.noises_in_sum(devices) * numbers) / devices
    if dp.unit != "library" or ratio < NOISE_WARNING:
        return None
    return (
        f"the noise has about {ratio:,.0f} times the largest possible L2 norm of the sum of {devices} "
        "devices' updates, so "
        "this run will damage the model; use more devices, a larger epsilon, or train fewer numbers (training.adapt)"
    )


def _delta_warning(recipe: Experiment) -> str | None:
    """That delta is not small beside the number of units that it holds for."""
    if not isinstance(recipe.privacy, PrivacyTarget) or isinstance(recipe.devices, RemoteDevices):
        return None
    target = recipe.privacy
    units = max((_units(recipe, count) for *_, count in describe_devices(recipe)), default=0)
    if units * target.delta <= MAX_DELTA_SUM:
        return None
    return (
        f"a device with {number_format.counted(units, target.unit)} and delta {format_delta(target.delta)} for each: "
        f"the guarantee may fail for one of them with probability up to {units * target.delta:.2g}; choose delta below "
        f"{MAX_DELTA_SUM:g} / {units} = {MAX_DELTA_SUM / units:.1g}"
    )


def _units(recipe: Experiment, photos: int) -> int:
    """How many privacy units so many photos of a device are, as far as it is known: at most one for each photo."""
    match recipe.privacy, recipe.devices:
        case PrivacyTarget(unit="library"), _:
            return 1
        case PrivacyTarget(unit="occasion"), SyntheticDevices(photos_per_occasion=size):
            return photos // size
    return photos


def _batch_size(recipe: Experiment, plan: Plan, photos: list[int]) -> Iterator[str]:
    """How many units join a step on average, and a warning where each sum is divided by a very different number."""
    schedule = plan.schedule
    unit = recipe.privacy.unit if isinstance(recipe.privacy, PrivacyTarget) else "photo"
    if unit == "occasion" and not isinstance(recipe.devices, SyntheticDevices):
        return  # known only once the photos are compared
    word = "occasion" if unit == "occasion" else "photo"
    held = [count if unit == "library" else _units(recipe, count) for count in photos]
    mean = (1 - recipe.holdout_fraction) * sum(held) / len(held)
    joining = schedule.sampling_rate * mean
    yield f"a device trains on {mean:.0f} {word}s on average, of which about {joining:.3g} join a step"
    if not 0.5 <= schedule.expected_batch_size / joining <= 2:
        yield (
            f"warning: each step's sum of about {joining:.3g} gradients is divided by the expected batch size "
            f"{schedule.expected_batch_size}; set training.expected_batch_size near {max(1, round(joining))}, or "
            f"training.sampling_rate near {min(1.0, schedule.expected_batch_size / mean):.2g}"
        )


def _stays(recipe: Experiment) -> str:
    if isinstance(recipe.training, PriorTrainingConfig):
        stays = "every photo and every latent of a photo"
        counts = "the number of units is part of the update, with noise like the rest"
    elif recipe.evaluation is not None:
        stays = "every photo and every gradient of a single photo"
        counts = (
            "shares of held-out photos by tone group are part of the metrics, without noise"
            if isinstance(recipe.privacy, PrivacyTarget) and recipe.privacy.noise == "central"
            else "counts of held-out units by tone group are part of the metrics, with noise"
        )
    else:
        stays, counts = "every photo, every gradient of a single photo, and the number of photos", ""
    match recipe.privacy:
        case PrivacyTarget(noise="central"):
            sent = "its update" if recipe.evaluation is None else "its updates and metrics"
            bound = f"no guarantee limits what the server can infer from {sent}, which it sees without noise"
        case PrivacyTarget(unit=unit):
            bound = f"the privacy guarantee bounds what anyone can infer about one {unit}"
        case NoPrivacy():
            bound = "no privacy guarantee limits what can be inferred from the sums"
    return "; ".join(part for part in (stays, counts, bound) if part)


def _holding(recipe: Experiment, count: int) -> str:
    """How many photos a simulated device holds, and how many occasions where those are the unit."""
    photos = number_format.counted(count, "photo")
    match recipe.privacy, recipe.devices:
        case PrivacyTarget(unit="occasion"), SyntheticDevices(photos_per_occasion=size):
            return f"{photos} in {number_format.counted(count // size, 'occasion')}"
    return photos
