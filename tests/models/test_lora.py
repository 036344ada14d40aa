"""Low-rank changes: linear in the trained weights, reproducible on device and server, and complete at full rank."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedface.errors import WeightsError
from fedface.models.checkpoint import flatten_parameters, load_gan, weights_hash
from fedface.models.discriminator import Discriminator, DiscriminatorConfig
from fedface.models.lora import Adaptation, Full, Lora, assign_trainable, attach, flatten_trainable, merge
from fedface.models.stylegan2 import StyleGAN2, StyleGAN2Config
from fedface.randomness import Streams
from fedface.tensor_types import Images
from fedface.training.dp_sgd import check_per_example_gradients
from fedface.training.per_example_gradients import (
    PerExampleProblem,
    per_example_gradients,
    trainable_parameters,
)
from fedface.training.unit_clipping import clipped_sum

STREAMS = Streams(21)


def discriminator() -> Discriminator:
    """A discriminator of 16 px with random weights, always the same."""
    return Discriminator(
        DiscriminatorConfig(size=16, channel_base=64, channel_max=6), STREAMS.generator("discriminator")
    )


def generator() -> StyleGAN2:
    """A generator of 16 px with random weights, always the same."""
    config = StyleGAN2Config(
        size=16, channel_base=64, channel_max=6, latent_width=8, style_width=8, mapping_layers=2
    )
    return StyleGAN2(config, STREAMS.generator("generator"))


def adapted(module: nn.Module, rank: int = 2, name: str = "adapters") -> nn.Module:
    """A copy with low-rank changes attached from a stream of the same seed."""
    reference = copy.deepcopy(module)
    attach(reference, Lora(rank=rank), STREAMS.generator(name))
    return reference


def moved(module: nn.Module, name: str) -> nn.Module:
    """A copy whose trained weights are random."""
    reference = copy.deepcopy(module)
    vector = flatten_trainable(reference)
    assign_trainable(torch.randn(len(vector), generator=STREAMS.generator(name)), reference)
    return reference


def merged(module: nn.Module) -> nn.Module:
    """A merged copy."""
    reference = copy.deepcopy(module)
    merge(reference)
    return reference


def pictures(count: int = 3) -> Images:
    """Noise images."""
    return torch.rand(count, 3, 16, 16, generator=STREAMS.generator("pictures"))


def loss(network: nn.Module, images: Images) -> Tensor:
    """The discriminator's loss on photos, one per photo."""
    return functional.softplus(-network(images))


@pytest.mark.parametrize("adapt", [Full(), Lora(rank=3)])
def test_attaching_changes_nothing_that_is_computed(adapt: Adaptation) -> None:
    """The change starts at zero, and merging at once restores the weights under their old names."""
    before = discriminator()
    after = copy.deepcopy(before)
    attach(after, adapt, STREAMS.generator("adapters"))
    assert torch.equal(after(pictures()), before(pictures()))
    merge(after)
    assert set(after.state_dict()) == set(before.state_dict())
    assert weights_hash(after) == weights_hash(before)
    assert all(weight.requires_grad for weight in after.parameters())


def test_training_all_weights_uses_the_flat_vector() -> None:
    """Full: `flatten_trainable` is `flatten_parameters`."""
    gan = discriminator(), generator()
    for module in gan:
        attach(module.requires_grad_(False), Full(), STREAMS.generator("unused"))
    assert torch.equal(flatten_trainable(*gan), flatten_parameters(*gan))


def test_two_machines_attach_the_same_adapters_and_merge_to_the_same_weights() -> None:
    """A device trains, the server fills its own copy; the frozen halves are never sent."""
    device = moved(adapted(generator()), "learning")
    server = adapted(generator())
    assign_trainable(flatten_trainable(device), server)
    assert weights_hash(merged(server)) == weights_hash(merged(device))
    assert weights_hash(merged(server)) != weights_hash(generator())
    other = adapted(generator(), name="another stream")
    assign_trainable(flatten_trainable(device), other)
    assert weights_hash(merged(other)) != weights_hash(merged(device))


def test_the_mean_of_updates_is_the_update_of_the_mean() -> None:
    """The merged mean of two devices equals the mean of their merged weights, which averaging A and B separately would
    break.
    """
    one, two = moved(adapted(discriminator()), "one"), moved(adapted(discriminator()), "two")
    mean = adapted(discriminator())
    assign_trainable((flatten_trainable(one) + flatten_trainable(two)) / 2, mean)
    apart = (flatten_parameters(merged(one)) + flatten_parameters(merged(two))) / 2
    assert float((flatten_parameters(merged(mean)) - apart).abs().max()) < 1e-6 * float(apart.abs().max())


def test_the_gradient_of_b_is_the_projected_gradient_of_w() -> None:
    """dL/dB = s (dL/dW) A^T, with s^2 A A^T = (inputs / rank) I."""
    plain, low = discriminator(), adapted(discriminator(), rank=3)
    torch.autograd.backward(loss(plain, pictures()).sum())
    torch.autograd.backward(loss(low, pictures()).sum())
    for name in ("b16.conv0", "b4.fc", "b8.skip"):
        whole = plain.get_parameter(f"{name}.weight").grad
        change = low.get_submodule(f"{name}.parametrizations.weight.0")
        inputs = whole[0].numel()
        down = change.get_buffer("down")
        assert torch.allclose(down @ down.T, torch.eye(3), atol=1e-6)
        expected = math.sqrt(inputs / 3) * whole.flatten(1) @ down.T
        got = change.get_parameter("up").grad
        assert float((got - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_at_full_rank_a_step_is_the_step_of_all_weights() -> None:
    """Any change can be represented, and plain descent at the same rate gives the same one."""
    plain, low = discriminator(), adapted(discriminator(), rank=4096)
    for module in (plain, low):
        torch.autograd.backward(loss(module, pictures()).sum())
        with torch.no_grad():
            for weight in trainable_parameters(module).values():
                weight.sub_(weight.grad, alpha=0.01)
    after = merged(low)
    for name in ("b16.conv1", "b8.conv0", "b4.conv", "b4.fc", "b4.out"):
        start, expected = (
            discriminator().get_parameter(f"{name}.weight"),
            plain.get_parameter(f"{name}.weight"),
        )
        got, expected = after.get_parameter(f"{name}.weight").detach(), expected.detach()
        assert not torch.equal(expected, start)
        assert float((got - expected).norm()) < 1e-4 * float((expected - start.detach()).norm())


def test_a_step_is_on_average_the_step_of_all_weights() -> None:
    """Over 400 samples of A the mean of s^2 A^T A is the identity, within five deviations of its entries."""
    layer = nn.Linear(12, 1, bias=False)
    total, trials = torch.zeros(12, 12), 400
    rng = STREAMS.generator("many")
    for _ in range(trials):
        reference = copy.deepcopy(layer)
        attach(reference, Lora(rank=2), rng)
        down = reference.get_buffer("parametrizations.weight.0.down")
        total += 12 / 2 * down.T @ down
    # An entry of A^T A is at most 1 and has mean r / i or 0: a deviation of at most s^2 sqrt(r / i) / 2.
    off = (total / trials - torch.eye(12)).abs().max()
    assert float(off) < 5 * 6 * math.sqrt(2 / 12) / 2 / math.sqrt(trials)


def test_per_example_gradients_work_with_an_adapter() -> None:
    """torch.func differentiates each photo alone; only the low-rank halves have gradients."""
    low = moved(adapted(discriminator()), "learning")
    check_per_example_gradients(PerExampleProblem(low, loss), pictures())
    gradients = per_example_gradients(PerExampleProblem(low, loss), pictures())
    assert [g.shape[1:] for g in gradients] == [w.shape for w in trainable_parameters(low).values()]
    assert all(name.endswith("up") for name in trainable_parameters(low))
    one = clipped_sum(gradients, 0.5)
    assert float(torch.cat([part.flatten() for part in one]).norm()) <= 3 * 0.5 * 1.0001


def test_merging_a_copy_leaves_the_original_adapted() -> None:
    """The server merges a copy after each round and continues with the same adapters."""
    low = moved(adapted(generator()), "learning")
    before, names = flatten_trainable(low), set(low.state_dict())
    assert set(merged(low).state_dict()) == set(generator().state_dict())
    assert torch.equal(flatten_trainable(low), before) and set(low.state_dict()) == names
    latents = torch.randn(2, 8, generator=STREAMS.generator("latents"))
    again = merged(low)
    pair = [net.synthesize(net.map(latents)) for net in (low, again)]
    assert torch.allclose(*pair, atol=1e-5)


def test_a_copy_in_float64_keeps_its_adapters() -> None:
    """The check of per-example gradients uses such a copy."""
    low = moved(adapted(discriminator()), "learning")
    exact = copy.deepcopy(low).double()
    assert exact(pictures().double()).dtype == torch.float64
    assert torch.allclose(exact(pictures().double()).float(), low(pictures()), atol=1e-4)


def test_the_mapping_network_and_biases_stay_frozen() -> None:
    """Only convolutions and style affines of a generator are trained."""
    low = adapted(generator())
    names = list(trainable_parameters(low))
    assert names and all(name.startswith("synthesis.") for name in names)
    assert {name.split(".parametrizations")[0].split(".")[-1] for name in names} >= {
        "affine",
        "conv1",
        "torgb",
    }


def test_the_number_of_trained_weights_follows_from_the_layers() -> None:
    """Outputs times rank, summed over layers, at ranks 1, 4 and 16; all weights are 866,196."""
    gan = load_gan()
    outputs = {
        key: sum(
            weight.shape[0] * min(rank, weight[0].numel())
            for module in gan.modules()
            for name, weight in module.named_parameters()
            if name.endswith(".weight") and weight.ndim >= 2 and "mapping" not in name
        )
        for key, rank in {1: 1, 4: 4, 16: 16}.items()
    }
    for rank, expected in outputs.items():
        copies = [adapted(module, rank) for module in gan.modules()]
        assert len(flatten_trainable(*copies)) == expected
    assert outputs == {1: 2157, 4: 8596, 16: 34096}
    assert len(flatten_trainable(*gan.modules())) == 866_196


def test_a_vector_of_another_length_is_refused() -> None:
    """The error has the number of trained weights."""
    low = adapted(discriminator())
    with pytest.raises(WeightsError, match=f"{len(flatten_trainable(low))} trained weights"):
        assign_trainable(torch.zeros(7), low)


def test_adapters_are_not_attached_twice() -> None:
    """Two on one layer would be trained as one and merged as two."""
    with pytest.raises(WeightsError, match="merge them before"):
        attach(adapted(discriminator()), Lora(), STREAMS.generator("again"))


@pytest.mark.parametrize("rank", [0, -1, 4097])
def test_a_rank_out_of_bounds_is_refused_by_name(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank must lie in \[1, 4096\], got {rank}"):
        Lora(rank=rank)
