"""A run from experiment to report: rounds, audits before and after, images, record and reports.

The server sees payloads and public images only. Each finished part is on disk; an interrupted run continues where it
stopped.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import assert_never

from fedface.atomic_io import replace_bytes, replace_text
from fedface.audits.bias import tone_histogram
from fedface.codec import encode
from fedface.config import dump
from fedface.coordinator.device_evaluation import evaluate_on_devices
from fedface.coordinator.rounds import ProgressListener, epsilon_spent, run_rounds
from fedface.coordinator.run_state import RunState, weights_path
from fedface.coordinator.server_metrics import (
    LeakageFinding,
    MethodEvaluation,
    ReferenceSet,
    aggregation_costs,
    audit_update_leakage,
    evaluate_on_probe,
    examples,
    make_reference_set,
    sample_metrics,
)
from fedface.errors import ConfigError, RunError
from fedface.experiment import (
    Experiment,
    LabelledDevices,
    LabelledProbe,
    RemoteDevices,
    SyntheticDevices,
    read_experiment,
)
from fedface.measurements import NotMeasured
from fedface.messages.cohort import Cohort
from fedface.models.checkpoint import load_model, save_model, weights_hash
from fedface.models.model import Model
from fedface.privacy.plan import Plan
from fedface.privacy.privacy_target import PrivacyTarget
from fedface.privacy_units import PLURALS, describe_unit
from fedface.public_data.device_photos import describe_devices, device_faces
from fedface.public_data.probe import PublicProbe, public_faces
from fedface.randomness import Streams
from fedface.reports import charts, html_report, model_card, run_record
from fedface.reports.formatting import defense_label
from fedface.reports.run_record import DeviceRecord, MachineRecord, PictureRecord, RunRecord, ToneRecord
from fedface.synthetic.faces import render_people
from fedface.tensor_types import Images
from fedface.training.training_methods import common_streams, noise_source, prepare_round
from fedface.upsampling.methods import BASELINES, is_deterministic, title_of

MIN_FACES = 40  # on each side of a comparison of samples with faces
TONE_SAMPLES = 512  # samples whose tones are counted

MAX_COST_DEVICES = 20  # with whose sum the costs of the protocols are measured


def initialize_run(experiment: Experiment, folder: Path) -> None:
    """Create a run's folder: the experiment, the base weights, an empty state.

    Raises:
        RunError: There is a run in this folder already.
    """
    if (folder / "state.json").exists():
        raise RunError(
            f"{folder}: a run was started here; continue it with --resume, or choose another folder"
        )
    (folder / "rounds").mkdir(parents=True, exist_ok=True)
    save_model(weights_path(folder, 0), experiment.start())
    replace_text(folder / "digest", experiment.digest())
    RunState(folder, datetime.now(UTC).isoformat(timespec="seconds"), ()).save()


def check_same(experiment: Experiment, folder: Path) -> None:
    """Write `experiment.yaml`, after checking that the run in this folder was started with this experiment.

    Its audits, and when a round begins and ends, may have changed since, because no result of a round depends on them.

    Raises:
        RunError: Something else has changed.
    """
    started_with = (folder / "digest").read_text(encoding="utf-8") if (folder / "digest").exists() else ""
    same = started_with == experiment.digest()
    if same and (experiment.base is None or experiment.base.exists()):
        stored = load_model(weights_path(folder, 0))
        same = weights_hash(*experiment.start().modules()) == weights_hash(*stored.modules())
    if not same:
        raise RunError(
            f"{folder}: this run was started with another experiment (see experiment.yaml there); "
            "resume with the same file and options, or start a new run. Only these may change: attack, "
            "upsampling and probe where no device uses them, and at_least, wait_minutes and answer_minutes of devices"
        )
    replace_text(folder / "experiment.yaml", dump(_without_places(experiment)))


def _without_places(experiment: Experiment) -> Experiment:
    """The same experiment for a folder that others may read: no path of this machine."""
    parts = {
        name: replace(part, folder=Path(part.folder.name))
        for name, part in (("devices", experiment.devices), ("probe", experiment.probe))
        if isinstance(part, LabelledDevices | LabelledProbe)
    }
    base = None if experiment.base is None else Path("rounds") / weights_path(Path(), 0).name
    return replace(experiment, base=base, **parts)  # type: ignore[arg-type]


def run_experiment(
    experiment: Experiment, cohort: Cohort, folder: Path, *, progress: ProgressListener, command: str = ""
) -> RunRecord:
    """Run or continue an experiment to its end in a folder of `initialize_run`.

    Args:
        folder: The run's folder; its name is the run's name.

    Returns:
        The record; `run.json`, `report.html`, `model-card.md` and the images are in the folder.
    """
    check_same(experiment, folder)
    progress.stage("computing the noise", 1)
    plan = experiment.plan()
    base = load_model(weights_path(folder, 0))
    size = base.size
    progress.stage("public faces", 1)
    probe = public_faces(experiment.probe, experiment.seed, size)
    reference = make_reference_set(experiment, probe, size)
    if len(reference.faces) < MIN_FACES:
        raise ConfigError(
            f"probe: {len(reference.faces)} public faces are too few to compare samples with; "
            f"raise probe.per_group so that there are at least {MIN_FACES}"
        )
    state = RunState.read(folder)
    withdrawn: set[int] = set()  # members whose owners have withdrawn
    state = evaluate_on_devices(experiment, plan, cohort, [("before", base)], state, progress, withdrawn)
    state = run_rounds(experiment, plan, cohort, state, reference, progress, withdrawn)
    final = load_model(weights_path(folder, experiment.rounds))
    state = evaluate_on_devices(
        experiment, plan, cohort, [("before", base), ("after", final)], state, progress, withdrawn
    )
    try:
        record = _audit(experiment, plan, state, (base, final), (probe, reference), progress)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        raise RunError(
            f"{folder}: the audits need more memory than there is. All {experiment.rounds} rounds are stored: "
            "continue with --resume and smaller audits, such as --set attack.candidates=100 --set "
            f"probe.per_group=4, or write a report without audits with `fedface report {folder}`"
        ) from error
    record = replace(record, command=command or record.command)
    run_record.write(record, folder)
    model_card.write(record, folder)
    html_report.write(record, folder)
    return record


def unaudited_record(folder: Path) -> RunRecord:
    """The record of a run that is not finished, and may be going on: its rounds, its privacy, what devices measured.

    Raises:
        RunError: There is no run in this folder, or its state is damaged.
        ConfigError: Its experiment cannot be read.
    """
    state = RunState.read(folder)
    stored = tuple(each for each in state.rounds if weights_path(folder, each.round).exists())
    state = replace(state, rounds=stored)  # the model of the last one may not be written yet
    experiment = read_experiment(folder / "experiment.yaml")
    last = load_model(weights_path(folder, len(state.rounds)))
    return _record(experiment, experiment.plan(), state, (load_model(weights_path(folder, 0)), last))


def _record(experiment: Experiment, plan: Plan, state: RunState, models: tuple[Model, Model]) -> RunRecord:
    """The record without audits; `models` are those before and after the rounds."""
    missing = NotMeasured(not_measured="the audits of this run have not ended")
    base, final = models
    return RunRecord(
        name=state.folder.name,
        question=experiment.question,
        started=state.started,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["fedface", "run", str(state.folder / "experiment.yaml")]),
        versions=run_record.installed_versions(),
        machine=MachineRecord.here(),
        experiment=encode(_without_places(experiment)),
        plan=plan,
        planned_epsilon=epsilon_spent(plan, experiment.rounds),
        base_hash=weights_hash(*base.modules()),
        final_hash=weights_hash(*final.modules()),
        devices=tuple(
            DeviceRecord(
                id=name,
                description="photos of its owner; not described",
                photos=NotMeasured(not_measured="private to its owner"),
            )
            for name in sorted({name for each in state.rounds for name in each.participants})
        ),
        metrics_before={},
        rounds=state.rounds,
        bias_before=missing,
        bias_after=missing,
        withdrawals=state.withdrawals,
        device_metrics=state.device_metrics,
        reference={},
        tones=(),
        attacks=(),
        aggregation=(),
        pictures={},
        notes=_notes(experiment, plan, base),
    )


def _audit(
    experiment: Experiment,
    plan: Plan,
    state: RunState,
    models: tuple[Model, Model],
    faces: tuple[PublicProbe, ReferenceSet],
    progress: ProgressListener,
) -> RunRecord:
    """The complete record of a run, with its pictures in the run's folder."""
    (base, final), (probe, reference), folder = models, faces, state.folder
    before, after = _evaluate_both(experiment, base, final, probe, progress)
    baselines = [
        evaluate_on_probe(base, probe, experiment.upsampling, method, experiment.seed, lambda done, of: None)
        for method in BASELINES
    ]
    progress.stage("attacks on one update", 1)
    work = prepare_round(final, experiment.training, plan.dp_parameters, common_streams(experiment.seed, 0))
    attacked = audit_update_leakage(
        work, probe, _candidates(experiment, base.size), plan, experiment.attack, experiment.seed
    )
    progress.advance(1)
    progress.stage("cost of secure aggregation", 1)
    # The update of one device of public faces: sizes and errors are those of a real update.
    streams = Streams(experiment.seed).child("cost")
    update = (
        work.update(probe.images, rng=noise_source(plan.dp_parameters, streams), streams=streams)
        / work.ranges()
    )
    costs = aggregation_costs(
        update.clamp(-1, 1),
        experiment.aggregation,
        experiment.agreement,
        min(max(2, experiment.devices.count), MAX_COST_DEVICES),
    )
    progress.advance(1)
    rng = Streams(experiment.seed)
    samples = {
        when: reference.samples(model, TONE_SAMPLES, rng.generator("report samples"))
        for when, model in (("before", base), ("after", final))
    }
    like_devices = None if isinstance(experiment.devices, RemoteDevices) else reference.faces
    parts = _Parts(base, final, probe, like_devices, before, after, baselines, samples)
    shortened = {attack.record.scores.shortened for attack in attacked} - {""}
    record = _record(experiment, plan, state, models)
    simulated = tuple(
        DeviceRecord(id=name, description=description, photos=count)
        for name, description, count in describe_devices(experiment)
    )
    return replace(
        record,
        devices=simulated or record.devices,
        metrics_before=sample_metrics(base, reference, experiment.seed),
        bias_before=before.bias,
        bias_after=after.bias,
        reference={title_of(served.method): served.bias for served in baselines},
        tones=_tones(parts),
        attacks=tuple(attack.record for attack in attacked),
        aggregation=tuple(costs),
        pictures=_pictures(folder, parts, attacked),
        notes=(*_notes(experiment, plan, base), *shortened),
    )


@dataclass(frozen=True)
class _Parts:
    """The content of the report's images."""

    base: Model
    final: Model
    probe: PublicProbe
    like_devices: Images | None
    before: MethodEvaluation
    after: MethodEvaluation
    baselines: list[MethodEvaluation]  # nearest and bicubic
    samples: dict[str, Images]


def _evaluate_both(
    experiment: Experiment, base: Model, final: Model, probe: PublicProbe, progress: ProgressListener
) -> tuple[MethodEvaluation, MethodEvaluation]:
    """The probe upsampled with both sets of weights, in parallel."""
    faces = len(probe.images) * experiment.upsampling.faces_per_photo
    method = experiment.method_for(base)
    progress.stage(f"{title_of(method)} on {len(probe.images)} probe faces, before and after", 2 * faces)
    done = {"before": 0, "after": 0}

    def count(when: str) -> Callable[[int, int], None]:
        def note(so_far: int, of: int) -> None:
            done[when] = round(faces * so_far / max(1, of))
            progress.advance(sum(done.values()))

        return note

    with ThreadPoolExecutor(2) as pool:
        searches = [
            pool.submit(
                evaluate_on_probe, model, probe, experiment.upsampling, method, experiment.seed, count(when)
            )
            for model, when in ((base, "before"), (final, "after"))
        ]
        before, after = (search.result() for search in searches)
    return before, after


def _candidates(experiment: Experiment, size: int) -> Images:
    """Public faces: the gallery of the attack, whose mean is the guess without the update."""
    count = experiment.attack.candidates
    found = device_faces(experiment, count, size) if isinstance(experiment.devices, LabelledDevices) else None
    if found is not None:
        return found
    streams = Streams(experiment.seed).child("candidates")
    return render_people(count, 0.5, size, streams)


def _tones(parts: _Parts) -> tuple[ToneRecord, ...]:
    generated = (
        ToneRecord(source="before", histogram=tone_histogram(parts.samples["before"])),
        ToneRecord(source="after", histogram=tone_histogram(parts.samples["after"])),
    )
    if parts.like_devices is None:
        return generated
    return (ToneRecord(source="devices", histogram=tone_histogram(parts.like_devices)), *generated)


def _pictures(folder: Path, parts: _Parts, attacked: list[LeakageFinding]) -> dict[str, PictureRecord]:
    chosen = examples(parts.probe)
    low = parts.before.low[chosen].clamp(0, 1)
    side = low.shape[-1]
    title = title_of(parts.before.method)
    shown = "Samples of the generator before and after, from the same latents."
    if parts.base.is_upsampler:
        shown = "The network's outputs before and after, for the same faces, distributed like the devices'."
    images = {
        "faces": charts.face_grid(
            [
                ("truth", parts.probe.images[chosen]),
                (f"input,\n{side} x {side}", low),
                *((title_of(served.method), served.upsampled.best()[chosen]) for served in parts.baselines),
                (f"{title},\nbefore", parts.before.upsampled.best()[chosen]),
                (f"{title},\nafter", parts.after.upsampled.best()[chosen]),
            ],
            [parts.probe.groups[i] for i in chosen],
        ),
        "samples": charts.face_grid(
            [
                *(
                    (f"before {row + 1}", parts.samples["before"][row * 10 : row * 10 + 10])
                    for row in range(2)
                ),
                *((f"after {row + 1}", parts.samples["after"][row * 10 : row * 10 + 10]) for row in range(2)),
            ],
            [str(i + 1) for i in range(10)],
        ),
        "attack": charts.attack_grid(
            attacked[0].result.truth,
            [(defense_label(attack.record.scores.defense), attack.result.recovered) for attack in attacked],
            attacked[0].result.guess,
        ),
    }
    for name, png in images.items():
        replace_bytes(folder / f"{name}.png", png)
    defenses = " and with ".join(defense_label(a.record.scores.defense) for a in attacked)
    return {
        "faces": PictureRecord(
            file="faces.png",
            section="faces",
            caption=f"Faces of the probe, the degraded input, and each method's output; of {title}, the face with the "
            "lowest consistency error before and after the run. The generated people do not exist.",
            alt=f"Grid of faces: truth, low-resolution input, nearest, bicubic, {title} before and after the run",
        ),
        "samples": PictureRecord(
            file="samples.png",
            section="more",
            caption=shown,
            alt="Two rows of generated faces before and two after the run",
        ),
        "attack": PictureRecord(
            file="attack.png",
            section="attacks",
            caption="One photo in one update: the truth, what the attack recovered, and a guess.",
            alt=f"Grid of faces: truth, recovered with {defenses}, and the mean face",
        ),
    }


def _notes(experiment: Experiment, plan: Plan, base: Model) -> tuple[str, ...]:
    notes = [
        "Tone is estimated from pixels, so every metric of tone includes light and camera.",
        "One run with one seed: another seed would give other numbers within, and sometimes beyond, the intervals.",
        "The distance uses features that need no download; it cannot be compared with published FID.",
    ]
    if base.is_upsampler:
        notes.append(
            "An upsampler does not sample by itself: its samples here are its outputs for degraded public faces, "
            "distributed like the devices'. No private photo was used for them."
        )
    if is_deterministic(experiment.method_for(base)):
        notes.append(
            f"The {title_of(experiment.method_for(base))} is deterministic: it gives one face for a photo that "
            "many faces fit, and the others are not shown."
        )
    match experiment.devices:
        case SyntheticDevices():
            notes.append("Devices are simulated and faces are synthetic: real people vary more.")
        case LabelledDevices():
            notes.append(
                "Devices are simulated. Group labels are annotators' judgement, not self-reported. "
                "Comparisons with the "
                "devices' faces use the photos themselves, which are public here; private photos cannot be used so."
            )
        case RemoteDevices():
            notes.append(
                "Nothing about the photos on the devices is published except the metrics that "
                "devices reported, with noise."
                if experiment.evaluation is not None
                else "Nothing is known about the photos on the devices, so no metric describes them."
            )
        case _:
            assert_never(experiment.devices)
    if experiment.base is None:
        notes.append("The base generator was trained on synthetic faces of which 85 in 100 have light skin.")
    if isinstance(plan.privacy, PrivacyTarget):
        notes.append(
            f"The privacy guarantee covers {describe_unit(plan.privacy.unit)}. A person in many "
            f"{PLURALS[plan.privacy.unit]} is protected less: the privacy losses of all that show them add up."
        )
    if plan.dp_parameters.is_private and plan.dp_parameters.noise == "central":
        releases = "update" if experiment.evaluation is None else "update and metrics"
        notes.append(
            f"The server is trusted: it receives each device's {releases} without noise and could keep them; no number "
            "here bounds what it could learn from that."
        )
    return tuple(notes)
