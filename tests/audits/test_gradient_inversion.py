"""Gradient inversion recovers a photo without noise, and nothing beyond guessing from noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor, nn

from fedface.aggregation.payload import AggregationParameters, MaskedConfig, SumContext
from fedface.aggregation.protocols import DeviceKeys, device_sum, server_sum
from fedface.aggregation.rehearsal import rehearse
from fedface.audits.gradient_inversion import (
    CosineSearch,
    GradientOf,
    NoDefense,
    SquaredSearch,
    apply_defense,
    attack_update,
    candidate_identification,
    invert,
    psnr,
    ssim,
)
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.privacy.accounting import reconstruction_success_bound
from fedface.privacy.clip_and_noise import clip_l2
from fedface.privacy.mechanism import ClippedSum, GaussianSum
from fedface.randomness import Streams
from fedface.tensor_types import Images
from fedface.training.gan import d_loss_real
from fedface.training.per_example_gradients import differentiable_gradient

STREAMS = Streams(11)
LENET_PARTS = 8


def rng(name: str) -> torch.Generator:
    return STREAMS.generator(name)


def discriminator_gradient(discriminator: nn.Module) -> GradientOf:
    """What one step of GAN training releases of a photo, before clipping and noise."""
    return differentiable_gradient(discriminator, lambda photos: d_loss_real(discriminator, photos).mean())


class LeNetLike(nn.Module):
    """Three 5 x 5 convolutions with sigmoids and one linear layer, as in Zhu et al. 2019."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, stride in ((3, 2), (12, 2), (12, 1)):
            layers += [nn.Conv2d(inputs, 12, 5, padding=2, stride=stride), nn.Sigmoid()]
        self.body = nn.Sequential(*layers)
        self.fc = nn.Sequential(nn.Linear(768, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.body(x).flatten(1))
        return logits


class Reference:
    """One reference vector: gradient function, released gradient, truth, and what was reached."""

    def __init__(self, path: Path) -> None:
        vectors = np.load(path)
        net = LeNetLike()
        net.load_state_dict({key[2:]: torch.from_numpy(vectors[key]) for key in vectors if key[:2] == "w/"})
        mean, std = (torch.from_numpy(vectors[key])[:, None, None] for key in ("mean", "std"))
        label = torch.from_numpy(vectors["y"])

        def gradient_of(images: Images) -> Tensor:
            loss = nn.functional.cross_entropy(net((images - mean) / std), label)
            parts = torch.autograd.grad(loss, list(net.parameters()), create_graph=True)
            return torch.cat([part.flatten() for part in parts])

        released = [torch.from_numpy(vectors[f"g/{index:03d}"]).flatten() for index in range(LENET_PARTS)]
        self.gradient_of: GradientOf = gradient_of
        self.released = torch.cat(released)
        self.truth = torch.from_numpy(vectors["img01"])[None]
        self.reached = torch.from_numpy(vectors["rec_x"]) * std + mean


def random_discs(count: int, generator: torch.Generator, size: int = 16) -> Images:
    """Discs of random colour, place and size on a background."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    colours = torch.rand(count, 2, 3, 1, 1, generator=generator)
    place = size * (0.35 + 0.3 * torch.rand(count, 3, 1, 1, generator=generator))
    inside = (x - place[:, 0]).square() + (y - place[:, 1]).square() < (0.6 * place[:, 2]).square()
    return torch.where(inside[:, None], colours[:, 0], colours[:, 1])


@pytest.fixture(scope="module")
def discriminator() -> Discriminator:
    return Discriminator(DiscriminatorConfig(size=16, channel_base=256, channel_max=32), rng("discriminator"))


def test_psnr_of_an_error_of_a_tenth_everywhere_is_20_db_and_equal_images_stop_at_100() -> None:
    truth = torch.full((2, 3, 12, 12), 0.5)
    assert psnr(truth + 0.1, truth).tolist() == pytest.approx([20.0, 20.0], abs=1e-4)
    assert psnr(truth, truth).tolist() == [100.0, 100.0]


def test_psnr_clamps_so_that_values_beyond_white_cost_nothing() -> None:
    white = torch.ones(1, 3, 12, 12)
    assert psnr(white * 1.5, white).item() == 100.0


def test_ssim_of_flat_images_is_its_luminance_term_alone() -> None:
    """Without contrast SSIM is (2ab + c) / (a^2 + b^2 + c) with c = 0.01^2 (Wang et al. 2004, equation 6)."""
    a, b = 0.8, 0.3
    flat = ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b)).item()
    assert flat == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), abs=1e-4)


def test_the_discriminators_gradient_is_that_of_softplus_of_the_negative_logit(
    discriminator: Discriminator,
) -> None:
    photos = random_discs(3, rng("three"))
    discriminator.zero_grad()
    torch.log1p(torch.exp(-discriminator(photos))).mean().backward()
    slow = torch.cat(
        [weight.grad.flatten() for weight in discriminator.parameters() if weight.grad is not None]
    )
    assert torch.allclose(discriminator_gradient(discriminator)(photos).detach(), slow, atol=1e-6)
    discriminator.zero_grad()


def test_a_release_is_clipped_and_has_the_mechanisms_noise() -> None:
    """Mean square of the noise is (sigma C)^2; over 40,000 draws its relative error is near 0.7 %."""
    gradient = torch.randn(40_000, generator=rng("gradient"))
    assert torch.equal(apply_defense(gradient, NoDefense(), rng("a")), gradient)
    clipped = apply_defense(gradient, ClippedSum(clip_norm=0.5), rng("a"))
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)
    noise = apply_defense(gradient, GaussianSum(clip_norm=0.5, sigma=2.0), rng("a")) - clipped
    assert noise.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("name", "search"),
    [
        pytest.param(
            "untrained", CosineSearch(iterations=2400, total_variation=1e-4), marks=pytest.mark.slow
        ),
        ("dp_s0.1", CosineSearch(iterations=300, total_variation=1e-2)),
    ],
)
def test_the_cosine_attack_reaches_what_a_published_implementation_reached(
    shared: Path, name: str, search: CosineSearch
) -> None:
    reference = Reference(shared / "refs" / f"inversion_lenet_{name}.npz")
    found = invert(reference.gradient_of, reference.released, (1, 3, 32, 32), search, rng(name))
    theirs = psnr(reference.reached, reference.truth).item()
    assert psnr(found.images, reference.truth).item() > theirs - 1.5


def test_a_photo_is_recovered_from_an_unprotected_lenet(shared: Path) -> None:
    """The planted positive: 15 dB above the best flat colour."""
    reference = Reference(shared / "refs" / "inversion_lenet_untrained.npz")
    assert torch.allclose(reference.gradient_of(reference.truth), reference.released, atol=1e-5)
    search = SquaredSearch(evaluations=950)
    found = invert(reference.gradient_of, reference.released, (1, 3, 32, 32), search, rng("lenet"))
    flat = reference.truth.mean(dim=(2, 3), keepdim=True).expand_as(reference.truth)
    gain = psnr(found.images, reference.truth) - psnr(flat, reference.truth)
    assert gain.item() > 15.0


@pytest.mark.parametrize("search", [CosineSearch(iterations=80), SquaredSearch(evaluations=60)])
def test_an_update_of_pure_noise_gives_no_more_than_guessing(
    discriminator: Discriminator, search: CosineSearch | SquaredSearch
) -> None:
    """Clean negative: a reconstruction from noise is on average no better than the mean face."""
    photos = random_discs(64, rng("photos"))
    public = random_discs(64, rng("public")).mean(dim=0, keepdim=True)
    gradient_of = discriminator_gradient(discriminator)
    noise = torch.randn(gradient_of(photos[:1]).shape, generator=rng("noise"))
    found = invert(gradient_of, noise, (1, 3, 16, 16), search, rng("start"))
    guessed = psnr(public.expand_as(photos), photos).mean().item()
    assert psnr(found.images.expand_as(photos), photos).mean().item() < guessed + 0.3


def test_the_attack_beats_guessing_without_noise_and_not_with_it(discriminator: Discriminator) -> None:
    photos, public = random_discs(4, rng("photos")), random_discs(64, rng("public"))
    search = CosineSearch(iterations=120)
    open_ = attack_update(
        discriminator_gradient(discriminator),
        photos,
        NoDefense(),
        public,
        searches=[search],
        generator=rng("open"),
    )
    noised = attack_update(
        discriminator_gradient(discriminator),
        photos,
        GaussianSum(clip_norm=1.0, sigma=1.0),
        public,
        searches=[search],
        generator=rng("dp"),
    )
    assert open_.scores.gain.low > 1.0
    assert noised.scores.gain.low < 0.0
    assert noised.scores.psnr.high < open_.scores.psnr.low
    assert open_.scores.psnr.estimate - open_.scores.baseline_psnr.estimate == pytest.approx(
        open_.scores.gain.estimate, abs=1e-4
    )
    assert open_.scores.baseline_psnr == noised.scores.baseline_psnr
    assert open_.scores.psnr.count == len(open_.recovered) == 4


def test_reconstructions_lie_in_range_and_are_deterministic(discriminator: Discriminator) -> None:
    gradient_of = discriminator_gradient(discriminator)
    target = gradient_of(random_discs(2, rng("two"))).detach()
    search = CosineSearch(iterations=5)
    first, again = (invert(gradient_of, target, (2, 3, 16, 16), search, rng("same")) for _ in range(2))
    assert torch.equal(first.images, again.images)
    assert 0.0 <= first.images.min() and first.images.max() <= 1.0


def test_without_noise_every_photo_is_identified_among_candidates(discriminator: Discriminator) -> None:
    named = candidate_identification(
        discriminator_gradient(discriminator),
        random_discs(30, rng("all")),
        NoDefense(),
        trials=40,
        generator=rng("t"),
    )
    assert named.rate.estimate == 1.0 and named.bound == 1.0
    assert named.rate.count == 40 and named.candidates == 30


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_masked_sum_without_noise_reveals_its_photos_and_one_with_noise_does_not(
    discriminator: Discriminator, sigma: float
) -> None:
    """Eight of 60 faces, two on each of four devices: least squares on the sum finds exactly these, or not."""
    gradient_of, faces = discriminator_gradient(discriminator), random_discs(60, rng("all"))
    clipped = torch.stack([clip_l2(gradient_of(face[None]).detach(), 1.0) for face in faces])
    members = torch.randperm(60, generator=rng("members"))[:8]
    noise = sigma * torch.randn(len(clipped[0]), generator=rng("noise"))  # as the sum of all devices has it
    updates = {
        device: clipped[members[2 * device : 2 * device + 2]].sum(0) + noise / 4 for device in range(4)
    }
    agreement = AggregationParameters(value_range=8.0, max_devices=4)
    context = SumContext(run="r", round=1, sum_of="updates", model="", terms="", cohort=4)
    config = MaskedConfig(bits=24)
    devices = {
        member: device_sum(config, agreement, DeviceKeys(signing=Ed25519PrivateKey.generate()), context)
        for member in updates
    }
    server = server_sum(config, agreement, context, len(clipped[0]))
    total = rehearse(server, devices, updates.__getitem__, 1).result.total
    weights = torch.linalg.lstsq(clipped.T.double(), total.double()[:, None]).solution[:, 0]
    found = set(weights.topk(8).indices.tolist())
    assert (found == set(members.tolist())) is (sigma == 0.0)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 50.0])
def test_identification_stays_below_the_theoretical_bound(discriminator: Discriminator, sigma: float) -> None:
    """No attack beats the trade-off function; at sigma 50 the bound is guessing, 1 / 30."""
    defence = GaussianSum(clip_norm=1.0, sigma=sigma)
    named = candidate_identification(
        discriminator_gradient(discriminator),
        random_discs(30, rng("all")),
        defence,
        trials=300,
        generator=rng("t"),
    )
    assert named.rate.low < named.bound == reconstruction_success_bound(defence.event(), 1 / 30)


def test_too_few_photos_or_no_search_are_refused(discriminator: Discriminator) -> None:
    photos = random_discs(2, rng("photos"))
    with pytest.raises(ValueError, match="at least 2"):
        attack_update(
            discriminator_gradient(discriminator), photos[:1], NoDefense(), photos, generator=rng("x")
        )
    with pytest.raises(ValueError, match="searches"):
        attack_update(
            discriminator_gradient(discriminator),
            photos,
            NoDefense(),
            photos,
            searches=[],
            generator=rng("x"),
        )
