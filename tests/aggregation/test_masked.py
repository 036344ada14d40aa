"""Masked sums: the same as plain ones, whoever drops out, and nothing else for a server that deviates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from fedface.aggregation.mask_graph import mask_graph
from fedface.aggregation.masked import (
    EXCHANGES,
    GIVEN,
    SEALED,
    SHARE,
    SIGNATURE,
    KeyMessage,
    Members,
    Participants,
    Words,
    digest,
    message,
    read_message,
    traffic,
)
from fedface.aggregation.masked_device import MaskedDevice
from fedface.aggregation.masked_server import MaskedServer
from fedface.aggregation.payload import (
    AggregationParameters,
    Exchange,
    MaskedConfig,
    OwnerTerms,
    Payload,
    SumContext,
)
from fedface.aggregation.rehearsal import rehearse
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

LENGTH = 50
CONFIG = MaskedConfig()
AGREEMENT = AggregationParameters(value_range=1.0, max_devices=64)
RING = Words(config=CONFIG, agreement=AGREEMENT)
CONTEXT = SumContext(run="run", round=3, sum_of="updates", model="model", terms="terms", cohort=3)
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([number] * 32)) for number in range(64)]


def device(number: int, **changes: object) -> MaskedDevice:
    """One of 64 devices."""
    one = MaskedDevice(
        config=CONFIG,
        agreement=AGREEMENT,
        ring=RING,
        context=CONTEXT,
        signing=KEYS[number],
        owner=OwnerTerms(smallest_cohort=2),
    )
    return replace(one, **changes)  # type: ignore[arg-type]


def vector(number: int) -> Vector:
    """The update of a device, on the grid of 16 bits, so that sums are exact."""
    steps = np.random.default_rng(number).integers(-32767, 32768, LENGTH)
    return torch.from_numpy((steps / 32767).astype(np.float32))


def protected(one: MaskedDevice, number: int, round: int = 3) -> bytes:
    """What a device stores of its update."""
    return one.protect(vector(number), round).to_bytes()


def keys_of(one: MaskedDevice, stored: bytes) -> Payload:
    """What it sends first."""
    return Payload.from_bytes(one.opening(stored))


def server(stored: Path | None = None, config: MaskedConfig = CONFIG) -> MaskedServer:
    """The server of the sum."""
    return MaskedServer(config, RING, CONTEXT, LENGTH, stored=stored)


@dataclass
class Sum:
    """One sum of some devices that a test can disturb."""

    devices: dict[int, MaskedDevice]
    server: MaskedServer = field(default_factory=server)
    tamper: Callable[[Exchange, int, bytes], bytes] = lambda exchange, member, content: content
    answered: Callable[[Exchange, int, bytes], bytes] = lambda exchange, member, answer: answer
    requests: dict[int, dict[Exchange, bytes]] = field(default_factory=dict)
    errors: dict[tuple[Exchange, int], str] = field(default_factory=dict)
    answers: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.stored = {member: protected(one, member) for member, one in self.devices.items()}
        self.requests = {member: {} for member in self.devices}

    def run(self) -> torch.Tensor:
        """The sum."""
        for member, one in self.devices.items():
            self.server.accept(member, keys_of(one, self.stored[member]), f"device {member}")
        for request in self.server.exchanges():
            for member, content in request.contents.items():
                self.requests[member][request.exchange] = self.tamper(request.exchange, member, content)
                try:
                    answer = self.devices[member].answer(
                        request.exchange, self.requests[member], self.stored[member]
                    )
                    self.answers[request.exchange, member] = answer
                    request.receive(member, self.answered(request.exchange, member, answer))
                except AggregationError as error:
                    self.errors[request.exchange, member] = str(error)
        return self.server.result().total


def some(count: int) -> dict[int, MaskedDevice]:
    """The first devices."""
    return {number: device(number) for number in range(count)}


def expected(*members: int) -> torch.Tensor:
    """The plain sum."""
    return torch.stack([vector(member).double() for member in members]).sum(0).float()


@settings(max_examples=15, deadline=None)
@given(count=st.integers(3, 14), exchange=st.sampled_from(EXCHANGES), seed=st.integers(0, 999))
def test_a_sum_survives_a_third_of_dropouts_in_any_exchange(
    count: int, exchange: Exchange, seed: int
) -> None:
    """It is the plain sum of those whose vectors arrived, exactly: their vectors are on the grid."""
    gone = frozenset(int(n) for n in np.random.default_rng(seed).permutation(count)[: count // 3])
    done = rehearse(server(), dict(some(count)), vector, 3, {exchange: gone})
    left = set(range(count)) - (gone if exchange in ("shares", "masked") else frozenset())
    assert done.result.members == left and done.result.count == len(left)
    assert torch.allclose(done.result.total, expected(*sorted(left)), atol=1e-5)


def test_a_sum_on_a_sparse_graph_survives_dropouts_in_every_exchange() -> None:
    """Sixty devices, of which no device has all others as partners, and one is lost in each exchange."""
    gone = {exchange: frozenset({7 * number}) for number, exchange in enumerate(EXCHANGES)}
    done = rehearse(server(), dict(some(60)), vector, 3, gone)
    assert mask_graph(60, corrupt=0).partners < 59
    assert done.result.members == set(range(60)) - {0, 7}
    assert torch.allclose(done.result.total, expected(*sorted(done.result.members)), atol=1e-5)


def test_the_traffic_of_a_device_is_what_the_plan_says() -> None:
    """Every byte of every exchange, for a complete graph."""
    done = rehearse(server(), dict(some(10)), vector, 3)
    assert (done.bytes_up, done.bytes_down) == traffic(CONFIG, 10, LENGTH, 4 * LENGTH)


def test_a_mask_is_the_keystream_of_aes_256_in_counter_mode() -> None:
    """As 32-bit words, for a vector that ends in the middle of a block."""
    total = np.ones(20_001, np.uint32)
    RING.add_mask(total, bytes(range(32)))
    cipher = Cipher(algorithms.AES(bytes(range(32))), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(cipher.update(bytes(4 * 20_001)), dtype="<u4")
    assert np.array_equal(total, words + np.uint32(1))
    RING.add_mask(total, bytes(range(32)), subtract=True)
    assert np.array_equal(total, np.ones(20_001, np.uint32))


def own_masks(one: Sum, *members: int) -> set[bytes]:
    """The digests of members' own masks, as they announced them."""
    keys = (keys_of(one.devices[member], one.stored[member]) for member in members)
    return {KeyMessage.from_bytes(each.parts[0]).own_mask for each in keys}


def revealed_masks(one: Sum) -> set[bytes]:
    """The digests of the own masks that were revealed."""
    revealed = (answer for (exchange, _), answer in one.answers.items() if exchange == "reveal")
    parts = (read_message(answer, "reveal", 2, length=LENGTH, round=3) for answer in revealed)
    return {digest(b"own mask", own) for own, _ in parts}


def masked_part(one: Sum, member: int) -> np.ndarray:
    """The masked vector of a member."""
    written, _ = read_message(one.answers["masked", member], "masked", 2, length=LENGTH, round=3)
    return np.frombuffer(written, dtype="<u4")


def test_equal_vectors_look_unrelated_and_no_float_leaves() -> None:
    """Every vector is zero; in the masked ones no number is repeated, and half of all bits are set."""
    one = Sum(some(3))
    one.stored = {
        member: each.protect(torch.zeros(LENGTH), 3).to_bytes() for member, each in one.devices.items()
    }
    assert torch.equal(one.run(), torch.zeros(LENGTH))
    words = np.concatenate([masked_part(one, member) for member in range(3)])
    assert len(set(words.tolist())) == 3 * LENGTH
    bits = np.unpackbits(words.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(len(bits))


@pytest.mark.parametrize("differs", ["model", "terms", "run", "round", "sum_of", "cohort"])
def test_devices_that_were_sent_something_else_have_no_sum_together(differs: str) -> None:
    """Keys that were signed for another model, other terms, another round or sum are not accepted."""
    other = replace(CONTEXT, **{differs: 9 if differs in ("round", "cohort") else "metrics"})
    stranger = device(2, context=other)
    opening = keys_of(stranger, protected(stranger, 2, other.round))
    one = server()
    with pytest.raises(AggregationError, match="not signed|expected a message"):
        one.accept(2, opening, "device 2")


def test_a_server_that_gives_devices_different_models_gets_nothing() -> None:
    """Inconsistent models (Pasquini et al. 2022): it lists all devices together, whatever model each of them has.

    No device finds that the others have signed their keys for its own model, so none gives a share or a vector.
    """
    others = replace(CONTEXT, model="another")
    devices = some(2) | {number: device(number, context=others) for number in (2, 3)}
    stored = {number: protected(one, number) for number, one in devices.items()}
    keys = [KeyMessage.from_bytes(keys_of(one, stored[number]).parts[0]) for number, one in devices.items()]
    listed = b"".join(each.to_bytes() for each in sorted(keys, key=lambda each: each.device))
    for number, one in devices.items():
        asked: dict[Exchange, bytes] = {
            "shares": message("shares", listed, length=LENGTH, round=3).to_bytes()
        }
        with pytest.raises(AggregationError, match="not signed by it"):
            one.answer("shares", asked, stored[number])


def test_a_device_answers_for_one_list_of_participants_that_has_its_own_keys() -> None:
    """A list without it, with another's key in its place, or with an entry that no one signed."""
    one = Sum(some(4))

    def without(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange != "shares" or member != 1:
            return content
        (listed,) = read_message(content, "shares", 1, length=LENGTH, round=3)
        keys = Participants.from_bytes(listed, CONTEXT, CONFIG).keys
        kept = tuple(each for each in keys if each.device != KEYS[1].public_key().public_bytes_raw())
        return message(
            "shares", b"".join(each.to_bytes() for each in kept), length=LENGTH, round=3
        ).to_bytes()

    one.tamper = without
    one.run()
    assert "does not have this device's keys" in one.errors["shares", 1]
    assert one.server.result().members == {0, 2, 3}


def forged(listed: bytes, member: int) -> bytes:
    """A list in which the server has put its own keys in the place of a member's."""
    keys = list(Participants.from_bytes(listed, CONTEXT, CONFIG).keys)
    mine = device(9)
    (own,) = read_message(mine.opening(protected(mine, 9)), "keys", 1, length=LENGTH, round=3)
    device_key = KEYS[member].public_key().public_bytes_raw()
    for index, each in enumerate(keys):
        if each.device == device_key:
            keys[index] = replace(KeyMessage.from_bytes(own), device=device_key)
    return b"".join(each.to_bytes() for each in keys)


def test_keys_that_a_device_did_not_sign_stop_the_others() -> None:
    """The server in the middle: it gives device 0 its own keys as those of device 2."""
    one = Sum(some(3))

    def swap(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange != "shares" or member != 0:
            return content
        (listed,) = read_message(content, "shares", 1, length=LENGTH, round=3)
        return message("shares", forged(listed, 2), length=LENGTH, round=3).to_bytes()

    one.tamper = swap
    one.run()
    assert "not signed by it" in one.errors["shares", 0]
    assert one.server.result().members == {1, 2}


def test_a_sum_smaller_than_any_owner_admits_is_not_revealed() -> None:
    """One of four demands five: nothing begins. It demands four: their sum is revealed, and not that of three."""
    with pytest.raises(AggregationError, match="fewer than the 5"):
        Sum(some(4) | {3: device(3, owner=OwnerTerms(smallest_cohort=5))}).run()
    four = some(4) | {3: device(3, owner=OwnerTerms(smallest_cohort=4))}
    assert torch.allclose(Sum(four).run(), expected(*range(4)), atol=1e-5)
    with pytest.raises(AggregationError, match="sum of 3 devices is not revealed: at least 4"):
        Sum(
            four,
            answered=lambda exchange, member, answer: b"" if exchange == "masked" and not member else answer,
        ).run()


def test_no_device_signs_or_reveals_a_sum_of_fewer_than_must_survive() -> None:
    """The server names survivors of its choice: too few, one alone, or one that never masked its vector."""
    for survivors in ({0}, {0, 1}, {0, 1, 2, 3, 4, 5}):
        one = Sum(some(7))

        def choose(exchange: Exchange, member: int, content: bytes, chosen: set[int] = survivors) -> bytes:
            if exchange != "survivors":
                return content
            listed = Members(indices=frozenset(chosen)).written
            return message("survivors", listed, length=LENGTH, round=3).to_bytes()

        def leave(exchange: Exchange, member: int, answer: bytes) -> bytes:
            return b"" if exchange == "shares" and member == 6 else answer

        one.tamper, one.answered = choose, leave
        with pytest.raises(AggregationError, match="signed the list of survivors"):
            one.run()
        assert not any(exchange == "reveal" for exchange, _ in one.answers)


def test_a_sum_without_enough_signatures_is_not_revealed() -> None:
    """The server passes on fewer, forged ones, or those of another list."""
    for forge in (
        lambda each: each[: SIGNATURE.size],
        lambda each: each[:-1] + bytes([each[-1] ^ 1]),
        lambda each: b"",
    ):
        one = Sum(some(6))

        def cut(
            exchange: Exchange, member: int, content: bytes, change: Callable[[bytes], bytes] = forge
        ) -> bytes:
            if exchange != "reveal":
                return content
            signed, masked = read_message(content, "reveal", 2, length=LENGTH, round=3)
            return message("reveal", change(signed), masked, length=LENGTH, round=3).to_bytes()

        one.tamper = cut
        with pytest.raises(AggregationError, match="cannot be removed"):
            one.run()
        assert not any(exchange == "reveal" for exchange, _ in one.answers)


def index_of(number: int, count: int) -> int:
    """The index of a device in the list of the first `count` devices."""
    ordered = sorted(range(count), key=lambda each: KEYS[each].public_key().public_bytes_raw())
    return ordered.index(number)


def without_device_5(exchange: Exchange, member: int, content: bytes) -> bytes:
    """Of six devices the server tells device 0 that device 5 gave no shares, so that it masks without that partner."""
    if exchange != "masked" or member != 0:
        return content
    listed, sealed = read_message(content, "masked", 2, length=LENGTH, round=3)
    hidden = index_of(5, 6)
    members = Members(indices=Members.from_bytes(listed, 6).indices - {hidden})
    left = b"".join(SEALED.pack(*entry) for entry in SEALED.iter_unpack(sealed) if entry[0] != hidden)
    return message("masked", members.written, left, length=LENGTH, round=3).to_bytes()


def test_the_masks_of_a_device_that_was_told_of_other_partners_are_not_revealed() -> None:
    """No one reveals the mask of device 0, since it signed another list; its vector stays hidden and the sum closed."""
    one = Sum(some(6), tamper=without_device_5)
    one.run()
    assert ("masked", 0) in one.answers and "has not signed the participants" in one.errors["masked", 0]
    assert one.server.result().members == {1, 2, 3, 4, 5}
    assert revealed_masks(one) == own_masks(one, 1, 2, 3, 4, 5)


def test_partners_reveal_no_mask_of_a_device_whose_signature_of_the_participants_they_are_not_shown() -> None:
    """A hostile server adds the vector of device 0 all the same and names it a survivor.

    Else it could name no partner at all to device 0, whose vector would have a mask of its own alone.
    """

    def hide(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange != "reveal":
            return without_device_5(exchange, member, content)
        signed, masked = read_message(content, "reveal", 2, length=LENGTH, round=3)
        shown = [each for each in SIGNATURE.iter_unpack(masked) if each[0] != index_of(0, 6)]
        left = b"".join(SIGNATURE.pack(*each) for each in shown)
        return message("reveal", signed, left, length=LENGTH, round=3).to_bytes()

    one = Sum(some(6), tamper=hide)

    def unverified(exchange: Exchange, member: int, answer: bytes) -> bytes:
        if exchange != "masked" or member != 0:
            return answer
        (listed,) = read_message(one.requests[0]["shares"], "shares", 1, length=LENGTH, round=3)
        everybody = Members(indices=frozenset(range(6)))
        content = Participants.from_bytes(listed, CONTEXT, CONFIG).included_signed(everybody)
        written, _ = read_message(answer, "masked", 2, length=LENGTH, round=3)
        return message("masked", written, KEYS[0].sign(content), length=LENGTH, round=3).to_bytes()

    one.answered = unverified
    with pytest.raises(AggregationError, match="cannot be removed"):
        one.run()
    revealed = {member: answer for (exchange, member), answer in one.answers.items() if exchange == "reveal"}
    assert set(revealed) == {1, 2, 3, 4, 5}
    for member, answer in revealed.items():
        _, shares = read_message(answer, "reveal", 2, length=LENGTH, round=3)
        others = {1, 2, 3, 4, 5} - {member}
        assert {index for index, *_ in SHARE.iter_unpack(shares)} == {index_of(each, 6) for each in others}


def test_no_device_takes_part_where_too_few_honest_shares_of_noise_may_be_in_the_sum() -> None:
    """Ten devices with three dropouts and a colluder leave six honest shares, of which the sum needs all; nine five."""
    context = replace(CONTEXT, cohort=10)

    def of(count: int) -> Sum:
        devices = {number: device(number, honest=6, context=context) for number in range(count)}
        return Sum(devices, server=MaskedServer(CONFIG, RING, context, LENGTH))

    assert torch.allclose(of(10).run(), expected(*range(10)), atol=1e-5)
    nine = of(9)
    with pytest.raises(AggregationError, match="0 of 9 devices gave shares"):
        nine.run()
    assert set(nine.errors) == {("shares", number) for number in range(9)}
    assert all("noise of only 5 honest ones, 6 are needed" in error for error in nine.errors.values())


def test_a_round_that_is_computed_again_has_new_keys_and_masks() -> None:
    """Two vectors under one mask would show their difference."""
    one = device(0)
    first, again = (KeyMessage.from_bytes(keys_of(one, protected(one, 0)).parts[0]) for _ in range(2))
    assert first.device == again.device
    assert {first.encryption, first.masking, first.own_mask}.isdisjoint(
        (again.encryption, again.masking, again.own_mask)
    )


def test_of_each_device_one_kind_of_share_is_revealed() -> None:
    """Device 4 drops out: its masking key is revealed, and of the others their own masks."""
    one = Sum(some(6))

    def leave(exchange: Exchange, member: int, answer: bytes) -> bytes:
        return b"" if exchange == "masked" and member == 4 else answer

    one.answered = leave
    total = one.run()
    assert torch.allclose(total, expected(0, 1, 2, 3, 5), atol=1e-5)
    assert revealed_masks(one) == own_masks(one, 0, 1, 2, 3, 5)
    revealed = [answer for (exchange, _), answer in one.answers.items() if exchange == "reveal"]
    for answer in revealed:
        _, shares = read_message(answer, "reveal", 2, length=LENGTH, round=3)
        assert len(shares) == 5 * SHARE.size  # one of each of the five others


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("spoilt", ["empty", "noise", "cut", "another round", "another exchange"])
def test_a_malformed_answer_costs_its_sender_alone(exchange: Exchange, spoilt: str) -> None:
    """It is named with the reason, and the sum is that of the others, or of all whose vectors had arrived."""

    def spoil(name: Exchange, member: int, answer: bytes) -> bytes:
        if name != exchange or member != 1:
            return answer
        payload = Payload.from_bytes(answer)
        match spoilt:
            case "empty":
                return b""
            case "noise":
                return np.random.default_rng(1).bytes(300)
            case "cut":
                return replace(payload, parts=(payload.parts[0][:-1], *payload.parts[1:])).to_bytes()
            case "another round":
                return replace(payload, header={**payload.header, "round": 2}).to_bytes()
            case _:
                return replace(payload, header={**payload.header, "exchange": "keys"}).to_bytes()

    one = Sum(some(6), answered=spoil)
    total = one.run()
    left = {0, 2, 3, 4, 5} | ({1} if exchange in ("survivors", "reveal") else set())
    assert (exchange, 1) in one.errors and one.server.result().members == left
    assert torch.allclose(total, expected(*sorted(left)), atol=1e-5)


@pytest.mark.parametrize("killed_in", EXCHANGES)
def test_a_server_that_is_killed_in_any_exchange_continues_the_same_sum(
    killed_in: Exchange, tmp_path: Path
) -> None:
    """Devices get the same requests again, in another order of members, and give the same answers."""
    path = tmp_path / "sums" / "updates-003.sum"
    first = Sum(some(6), server=server(path))

    def kill(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange == killed_in and member == 3:
            raise KeyboardInterrupt
        return content

    first.tamper = kill
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Sum({member: first.devices[member] for member in (5, 4, 3, 2, 1, 0)}, server=server(path))
    second.stored, asked_before = first.stored, first.requests
    second.requests = {member: dict(asked) for member, asked in asked_before.items()}
    assert torch.allclose(second.run(), expected(*range(6)), atol=1e-5)
    for member, asked in asked_before.items():
        assert {exchange: second.requests[member][exchange] for exchange in asked} == asked


def test_a_sum_that_was_begun_admits_no_further_device(tmp_path: Path) -> None:
    """After a restart, a device that had been late the first time."""
    path = tmp_path / "sums" / "sum"
    first = Sum(some(4), server=server(path))
    first.tamper = lambda exchange, member, content: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    late = device(7)
    with pytest.raises(AggregationError, match="begun without this device"):
        server(path).accept(7, keys_of(late, protected(late, 7)), "late")


def test_an_exchange_with_other_settings_than_the_vector_was_computed_for_is_refused() -> None:
    """A server that could change the tolerated shares afterwards would open two sums, or single vectors."""
    one = device(0)
    stored = protected(one, 0)
    for config in (
        MaskedConfig(dropout_share=0.4),
        MaskedConfig(corrupt_share=0.0),
        MaskedConfig(min_devices=3),
    ):
        with pytest.raises(AggregationError, match="other settings"):
            replace(one, config=config).answer("shares", {"shares": b""}, stored)


def test_a_short_list_does_not_lower_the_number_of_tolerated_colluders() -> None:
    """Of twenty that were asked two may collude. A list of six bears none: two of them would sign two lists."""
    context = replace(CONTEXT, cohort=20)
    devices = {number: device(number, context=context) for number in range(6)}
    with pytest.raises(AggregationError, match="at least"):
        rehearse(MaskedServer(CONFIG, RING, context, LENGTH), dict(devices), vector, 3)


def test_a_device_whose_partners_are_declared_lost_does_not_sign() -> None:
    """The server knows the masks that a device shares with lost partners: without others its vector would be open."""
    config = MaskedConfig(dropout_share=0.3, corrupt_share=0.0)
    context = replace(CONTEXT, cohort=50)
    devices = {number: device(number, config=config, context=context) for number in range(50)}
    one = Sum(devices, server=MaskedServer(config, RING, context, LENGTH))

    def drop(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange != "survivors" or member != 0:
            return content
        (given,) = read_message(one.answers["shares", 0], "shares", 1, length=LENGTH, round=3)
        partners = {index for index, *_ in GIVEN.iter_unpack(given)}
        (listed,) = read_message(content, "survivors", 1, length=LENGTH, round=3)
        left = Members.from_bytes(listed, 50).indices - set(sorted(partners)[:15])
        return message("survivors", Members(indices=left).written, length=LENGTH, round=3).to_bytes()

    one.tamper = drop
    one.run()
    assert "partners have survived" in one.errors["survivors", 0]
    assert {exchange for exchange, _ in one.errors} == {"survivors", "reveal"}


@pytest.mark.parametrize("false", ["digests", "number", "own"])
def test_false_shares_cost_their_sender_nothing_that_others_need(false: str) -> None:
    """Device 2 announces false digests, reveals a false number, or a false secret of its own mask: it is named."""

    def spoil(exchange: Exchange, member: int, answer: bytes) -> bytes:
        if member != 2 or exchange not in ("shares", "reveal"):
            return answer
        parts = read_message(answer, exchange, 1 if exchange == "shares" else 2, length=LENGTH, round=3)
        if (exchange, false) == ("shares", "digests"):
            entries = [
                (index, sealed, bytes(32), own) for index, sealed, _, own in GIVEN.iter_unpack(parts[0])
            ]
            return message(
                "shares", b"".join(GIVEN.pack(*each) for each in entries), length=LENGTH, round=3
            ).to_bytes()
        if (exchange, false) == ("reveal", "number"):
            shares = [
                SHARE.pack(index, b"\x00\x07", share) for index, _, share in SHARE.iter_unpack(parts[1])
            ]
            return message("reveal", parts[0], b"".join(shares), length=LENGTH, round=3).to_bytes()
        if (exchange, false) == ("reveal", "own"):
            return message("reveal", bytes(32), parts[1], length=LENGTH, round=3).to_bytes()
        return answer

    def lost(exchange: Exchange, member: int, answer: bytes) -> bytes:
        return b"" if (exchange, member) == ("reveal", 4) else spoil(exchange, member, answer)

    one = Sum(some(7), answered=lost)
    assert torch.allclose(one.run(), expected(*range(7)), atol=1e-5)
    assert (("reveal", 2) in one.errors) == (false == "own")


def test_keys_that_would_stop_others_are_refused_by_name() -> None:
    """Of small order, equal, copied from another device, or with a demand that no sum can meet."""
    one, honest = server(), device(0)
    stored = {number: protected(device(number), number) for number in range(4)}
    one.accept(0, keys_of(honest, stored[0]), "honest")
    one.accept(3, keys_of(device(3), stored[3]), "honest too")
    (written,) = read_message(honest.opening(stored[0]), "keys", 1, length=LENGTH, round=3)
    good = KeyMessage.from_bytes(written)
    mine = replace(
        good,
        device=KEYS[1].public_key().public_bytes_raw(),
        encryption=bytes(32),
        masking=bytes(31) + b"\x09",
    )
    for keys, words in (
        (replace(mine, encryption=bytes(31) + b"\x07", masking=bytes(32)), "small order"),
        (replace(mine, encryption=good.encryption), "another device"),
        (replace(mine, encryption=mine.masking), "or equal"),
    ):
        signed = keys.sign(KEYS[1], CONTEXT).to_bytes()
        with pytest.raises(AggregationError, match=words):
            one.accept(1, message("keys", signed, length=LENGTH, round=3), "hostile")
    greedy = device(2, owner=OwnerTerms(smallest_cohort=2**32 - 1))
    one.accept(2, keys_of(greedy, protected(greedy, 2)), "greedy")
    assert one.close() == {2: f"its owner demands a sum of {2**32 - 1} devices, 3 gave keys"}


def test_a_server_killed_while_it_reveals_shows_the_same_signatures_again(tmp_path: Path) -> None:
    """Also if one of those who had signed is gone by then."""
    path = tmp_path / "sums" / "sum"
    first = Sum(some(6), server=server(path))

    def kill(exchange: Exchange, member: int, content: bytes) -> bytes:
        if exchange == "reveal" and member == 3:
            raise KeyboardInterrupt
        return content

    first.tamper = kill
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = Sum(first.devices, server=server(path))
    second.stored, second.requests = (
        first.stored,
        {member: dict(asked) for member, asked in first.requests.items()},
    )
    second.answered = lambda exchange, member, answer: b"" if member == 5 else answer
    assert torch.allclose(second.run(), expected(*range(6)), atol=1e-5)
    assert all(second.requests[member]["reveal"] == first.requests[member]["reveal"] for member in range(3))


def test_what_stays_after_the_last_exchange_has_neither_secret_nor_vector() -> None:
    """Whoever takes the device later can open nothing; the keys that it sent are sent again if they are asked for."""
    one = device(0)
    stored = protected(one, 0)
    closed = one.closed(stored)
    secret, integers = Payload.from_bytes(stored).parts
    assert closed == one.opening(stored) == one.opening(closed) == one.closed(closed)
    assert secret not in closed and integers not in closed


def test_one_signing_key_on_two_devices_is_named() -> None:
    """A copied state folder: one vector must not count twice."""
    one = server()
    for member in range(2):
        copy = device(5)
        opening = keys_of(copy, protected(copy, 5))
        if member:
            with pytest.raises(AggregationError, match="another device has the same signing key"):
                one.accept(member, opening, "copy")
        else:
            one.accept(member, opening, "first")


def test_a_list_longer_than_the_server_said_bears_a_tenth_of_its_devices() -> None:
    """Two are stated and forty take part: four may collude, as of forty that were stated."""
    keys = Participants(
        context=replace(CONTEXT, cohort=2), config=CONFIG,
        keys=tuple(
            KeyMessage(
                device=bytes([number]) * 32, encryption=bytes([number, 1]) * 16, masking=bytes([number, 2]) * 16,
                own_mask=bytes(32), smallest_cohort=2,
            )
            for number in range(40)
        ),
    )  # fmt: skip
    assert keys.graph == mask_graph(40, corrupt=4) and keys.graph.corrupt == 4


def test_sums_that_do_not_fit_the_ring_are_refused() -> None:
    """24 bits for 1,000 devices take 34 bits."""
    agreement = AggregationParameters(value_range=1.0, max_devices=1000)
    with pytest.raises(AggregationError, match="more than 32"):
        Words(config=MaskedConfig(bits=24), agreement=agreement)


def test_digests_of_parts_do_not_depend_on_where_they_are_cut() -> None:
    """Each part is behind its length."""
    assert digest(b"ab", b"c") != digest(b"a", b"bc")
