"""The benchmark of methods on one probe: baselines are included, and a method that lightens all faces is detected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import GENERATOR, RESOLVER, SilentProgress

from fedface.codec import loads
from fedface.coordinator.method_benchmark import benchmark_methods, with_baselines
from fedface.experiment import SyntheticProbe
from fedface.measurements import Interval, NotMeasured
from fedface.models.model import GeneratorArchitecture, Model, SuperResolutionArchitecture, build_model
from fedface.public_data.probe import public_faces
from fedface.randomness import Streams
from fedface.reports import method_report
from fedface.reports.method_report import BenchmarkRecord, MethodMetrics
from fedface.upsampling.degradation import Area
from fedface.upsampling.feedforward import BicubicConfig, NearestConfig, SuperResolutionConfig
from fedface.upsampling.methods import METHODS, name_of
from fedface.upsampling.pulse import PulseConfig

STREAMS = Streams(6)


def whitening() -> Model:
    """A network that returns white for every photo: the planted fault."""
    model = build_model(SuperResolutionArchitecture(network=RESOLVER), STREAMS.generator("white"))
    assert isinstance(model.architecture, SuperResolutionArchitecture)
    with torch.no_grad():
        model.upsampler.tail.weight.zero_()
        assert model.upsampler.tail.bias is not None
        model.upsampler.tail.bias.fill_(1.0)
    return model


@pytest.fixture(scope="module")
def compared() -> tuple[BenchmarkRecord, dict[str, bytes]]:
    """A short search, the planted fault, and the baselines, on ten synthetic faces."""
    pairs = [
        (
            PulseConfig(steps=2, mapping_samples=100),
            build_model(GeneratorArchitecture(generator=GENERATOR), STREAMS.generator("g")),
        ),
        (SuperResolutionConfig(), whitening()),
        (NearestConfig(), None),
        (BicubicConfig(), None),
    ]
    return benchmark_methods(
        pairs,
        public_faces(SyntheticProbe(per_group=9), 1, 16),
        Area(2),
        faces_per_photo=2,
        seed=1,
        progress=SilentProgress(),
        command="fedface benchmark",
    )


def of(record: BenchmarkRecord, name: str) -> MethodMetrics:
    """The metrics of one method."""
    return next(each for each in record.methods if each.method == name)


def test_every_benchmark_includes_the_baselines() -> None:
    assert with_baselines([METHODS["pulse"]]) == [METHODS["pulse"], NearestConfig(), BicubicConfig()]
    named = [METHODS["bicubic"], METHODS["pulse"]]
    assert list(map(name_of, with_baselines(named))) == ["bicubic", "pulse", "nearest"]


def test_nearest_fits_exactly_and_preserves_tone(
    compared: tuple[BenchmarkRecord, dict[str, bytes]],
) -> None:
    """Clean negative: the mean of a block is the pixel, so nearest has consistency error 0 and changes no tone."""
    nearest = of(compared[0], "nearest")
    consistency_error, fits, change = (
        nearest.bias.report.overall.consistency_error, nearest.bias.report.overall.converged,
        nearest.bias.report.darker_change,
    )  # fmt: skip
    assert consistency_error.estimate < 1e-12 and fits.estimate == 1.0
    assert change.low <= 0 <= change.high
    assert isinstance(nearest.spread, NotMeasured)


def test_a_method_that_lightens_all_faces_is_detected(
    compared: tuple[BenchmarkRecord, dict[str, bytes]],
) -> None:
    """Planted positive: no output is dark, and the darkest group changes most."""
    white = of(compared[0], "super-resolution")
    assert white.darker_generated.estimate == 0.0 and white.darker_true.estimate > 0.3
    assert white.bias.report.darker_change.high < 0
    shifts = [group.lightness_shift for group in white.bias.report.groups.values()]
    assert list(white.bias.report.counts)[-1] == list(white.bias.report.groups)[-1] == "Monk 9-10"
    assert shifts[-1].low > shifts[0].high > 0


def test_searches_report_the_spread_of_their_faces(
    compared: tuple[BenchmarkRecord, dict[str, bytes]],
) -> None:
    pulse = of(compared[0], "pulse")
    assert isinstance(pulse.spread, Interval) and pulse.spread.estimate > 0
    assert pulse.bias.report.faces_per_photo == 2
    assert of(compared[0], "nearest").bias.report.faces_per_photo == 1


def test_the_record_is_read_back_and_the_table_has_every_method(
    compared: tuple[BenchmarkRecord, dict[str, bytes]], tmp_path: Path
) -> None:
    record, pictures = compared
    (tmp_path / "out").mkdir()
    path = method_report.write(record, pictures, tmp_path / "out")
    assert loads(BenchmarkRecord, (tmp_path / "out" / "benchmark.json").read_text()) == record
    table = path.read_text()
    for each in record.methods:
        assert table.count(f"| {each.title} |") == 2 + len(method_report.BY_GROUP)
    assert "## Limitations" in table
    assert all((tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_probe_is_sampled_from_a_population_or_balanced() -> None:
    """85 % light: about that many of 200; balanced: four of each group."""
    balanced, people = (
        public_faces(probe, 3, 16)
        for probe in (SyntheticProbe(per_group=4), SyntheticProbe(per_group=40, light_fraction=0.85))
    )
    assert [balanced.groups.count(name) for name in balanced.expected] == [4] * 5
    light = sum(people.groups.count(name) for name in people.expected[:2])
    assert len(people.groups) == 200 and 110 < light < 190
    assert "85% of them light" in people.description
