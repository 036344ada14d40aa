"""The server's side of a masked sum (masked.py): it passes lists and shares on, adds masked vectors, removes masks.

It has no key. What it must not lose is written to a file before devices are asked, since they answer each exchange for
one request only: a server that restarts asks the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedface.aggregation.masked import (
    GIVEN,
    SEALED,
    SHARE,
    SIGNATURE,
    Grid,
    KeyMessage,
    Members,
    Participants,
    Ring,
    add_mask,
    digest,
    entries,
    message,
    message_parts,
    public_bytes,
    read_message,
    shared_secret,
    verify,
)
from fedface.aggregation.payload import AggregationParameters, Exchange, MaskedConfig, Payload, SumContext
from fedface.aggregation.shamir import join
from fedface.aggregation.sums import Request, SumResult
from fedface.atomic_io import replace_bytes
from fedface.errors import AggregationError
from fedface.privacy.plan import DPParameters


class MaskedServer:
    """One masked sum."""

    def __init__(
        self,
        config: MaskedConfig,
        agreement: AggregationParameters,
        context: SumContext,
        length: int,
        *,
        dp: DPParameters | None = None,
        stored: Path | None = None,
        fewest: int = 1,
    ) -> None:
        """The sum of vectors (`length`,); one that was begun and is stored in that file is continued.

        Raises AggregationError if the file is not one of this sum, PrivacyError if distributed noise does not fit it.
        """
        self._grid = Grid(config=config, agreement=agreement, dp=dp)
        self._grid.noise(length)  # before a device is asked
        self._config, self._context, self._length, self._file = config, context, length, stored
        self._fewest = fewest
        self._keys: dict[int, KeyMessage] = {}
        self._probe = X25519PrivateKey.generate()
        self._state = _Stored()
        if stored is not None and stored.exists():
            self._state = _Stored.from_bytes(stored.read_bytes(), length, context.round)

    def accept(self, member: int, payload: Payload, device: str) -> None:
        """Take a device's keys. Raises AggregationError with what is wrong with them."""
        (written,) = message_parts(payload, "keys", 1, length=self._length, round=self._context.round)
        keys = KeyMessage.from_bytes(written)
        keys.check(self._context)
        if any(keys.device == other.device for other in self._keys.values()):
            raise AggregationError("another device has the same signing key; give each its own state folder")
        known = {key for other in self._keys.values() for key in (other.encryption, other.masking)}
        if len(known | {keys.encryption, keys.masking}) != len(known) + 2:
            raise AggregationError("its keys are those of another device, or equal")
        for key in (keys.encryption, keys.masking):
            shared_secret(self._probe, key)  # of small order: every partner would stop
        if self._state.participants and keys.to_bytes() not in self._known():
            raise AggregationError("the sum of this round was begun without this device")
        self._keys[member] = keys

    def close(self) -> Mapping[int, str]:
        """Those whose owners demand larger sums than there can be."""
        left: dict[int, str] = {}
        while not self._state.participants:
            count = len(self._keys)
            greedy = [member for member, keys in self._keys.items() if keys.smallest_cohort > count]
            if not greedy:
                break
            for member in greedy:
                demanded = self._keys.pop(member).smallest_cohort
                left[member] = f"its owner demands a sum of {demanded} devices, {count} gave keys"
        return left

    def _known(self) -> set[bytes]:
        return {each.to_bytes() for each in self._participants().keys}

    def _participants(self) -> Participants:
        return Participants.from_bytes(self._state.participants, self._context, self._config)

    def exchanges(self) -> Iterator[Request]:
        """What to ask the devices, one exchange after the other; the next is made from the answers.

        Raises AggregationError if too few devices remain.
        """
        if not self._state.participants:
            ordered = sorted(self._keys.values(), key=lambda keys: keys.device)
            everybody = Participants(context=self._context, config=self._config, keys=tuple(ordered))
            everybody.check_size()
            self._state.participants = everybody.to_bytes()
            self._save()
        everybody = self._participants()
        members = {
            next(index for index, each in enumerate(everybody.keys) if each == keys): member
            for member, keys in self._keys.items()
        }
        if not self._state.shares:
            given: dict[int, bytes] = {}

            def give(index: int, parts: tuple[bytes, ...]) -> None:
                given[index] = self._checked_shares(everybody, index, parts[0])

            asked = {member: (self._state.participants,) for member in members.values()}
            yield self._request("shares", asked, members, give)
            self._check_enough(everybody, len(given), "gave shares")
            self._state.shares = given
            self._save()
        partners = _Partners(participants=everybody, shares=self._state.shares)
        included = partners.included
        if self._state.total is None:
            total, arrived = np.zeros(self._length, np.uint32), dict[int, bytes]()

            def add(index: int, parts: tuple[bytes, ...]) -> None:
                if len(parts[0]) != 4 * self._length:
                    raise AggregationError(
                        f"expected {self._length} masked numbers, got {len(parts[0])} bytes"
                    )
                agreed = everybody.included_signed(included)
                verify(everybody.keys[index].device, parts[1], agreed, "it has not signed the participants")
                np.add(total, np.frombuffer(parts[0], dtype="<u4"), out=total)
                arrived[index] = parts[1]

            passed_on = {
                members[index]: (included.to_bytes(), partners.for_receiver(index))
                for index in included.indices & set(members)
            }
            yield self._request("masked", passed_on, members, add)
            survivors = Members(indices=frozenset(arrived))
            everybody.check_survivors(included, survivors)
            if len(arrived) < self._fewest:
                raise AggregationError(f"{len(arrived)} vectors arrived, {self._fewest} are needed")
            self._state.total = total
            self._state.arrived = b"".join(
                SIGNATURE.pack(index, each) for index, each in sorted(arrived.items())
            )
            self._save()
        agreed = entries(SIGNATURE, self._state.arrived, len(everybody.keys), most=len(everybody.keys))
        survivors = Members(indices=frozenset(agreed))
        there = {index: member for index, member in members.items() if index in survivors.indices}
        content = everybody.survivors_signed(included, survivors)
        signed: dict[int, bytes] = {}

        def sign(index: int, parts: tuple[bytes, ...]) -> None:
            verify(everybody.keys[index].device, parts[0], content, "its signature of the survivors is wrong")
            signed[index] = parts[0]

        if not self._state.signatures:
            asked = {member: (survivors.to_bytes(),) for member in there.values()}
            yield self._request("survivors", asked, there, sign)
            self._check_enough(everybody, len(signed), "signed the list of survivors")
            self._state.signatures = b"".join(
                SIGNATURE.pack(index, each) for index, each in sorted(signed.items())
            )
            self._save()
        signatures = self._state.signatures
        unmasking = _Unmasking(partners, survivors)
        shown = {
            member: (
                signatures,
                b"".join(
                    SIGNATURE.pack(sender, agreed[sender][0])
                    for sender in partners.senders_to(index)
                    if sender in agreed
                ),
            )
            for index, member in there.items()
        }
        yield self._request("reveal", shown, there, unmasking.take)
        total = self._state.total.copy()
        unmasking.unmask(total)
        self._result = SumResult(
            total=self._grid.from_ring(total, len(survivors.indices)),
            members=frozenset(members[index] for index in survivors.indices if index in members),
            count=len(survivors.indices),
        )

    def result(self) -> SumResult:
        """The sum, after all exchanges."""
        return self._result

    def _check_enough(self, everybody: Participants, count: int, what: str) -> None:
        if count < everybody.fewest:
            raise AggregationError(
                f"{count} of {len(everybody.keys)} devices {what}, {everybody.fewest} must; nothing was revealed"
            )

    def _read(self, written: bytes, exchange: str) -> tuple[bytes, ...]:
        parts = 2 if exchange in ("masked", "reveal") else 1
        return read_message(written, exchange, parts, length=self._length, round=self._context.round)

    def _request(
        self,
        exchange: Exchange,
        asked: Mapping[int, tuple[bytes, ...]],
        members: Mapping[int, int],
        receive: Callable[[int, tuple[bytes, ...]], None],
    ) -> Request:
        indices = {member: index for index, member in members.items()}

        def take(member: int, written: bytes) -> None:
            receive(indices[member], self._read(written, exchange))

        written = {  # one object for all that are asked the same
            parts: message(exchange, *parts, length=self._length, round=self._context.round).to_bytes()
            for parts in set(asked.values())
        }
        contents = {member: written[asked[member]] for member in sorted(asked)}
        return Request(exchange=exchange, contents=contents, receive=take)

    def _checked_shares(self, everybody: Participants, index: int, written: bytes) -> bytes:
        found = entries(GIVEN, written, len(everybody.keys), most=everybody.graph.partners)
        if len(found) != everybody.graph.partners or index in found:
            raise AggregationError(f"expected shares for {everybody.graph.partners} others, got {len(found)}")
        return written

    def _save(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(exist_ok=True, mode=0o700)
            replace_bytes(self._file, self._state.to_bytes(self._length, self._context.round))


@dataclass(kw_only=True)
class _Stored:
    """What a server needs in order to ask the same again."""

    participants: bytes = b""
    shares: dict[int, bytes] = field(default_factory=dict)  # as each sender gave them, by its index
    arrived: bytes = b""  # the survivors' signatures of the list of those who gave shares
    total: Ring | None = None  # of the survivors' masked vectors
    signatures: bytes = b""  # of the list of survivors

    def to_bytes(self, length: int, round: int) -> bytes:
        """As a payload: participants, signatures, total, then the shares of each sender behind its index."""
        total = b"" if self.total is None else self.total.astype("<u4").tobytes()
        shares = (index.to_bytes(4, "big") + written for index, written in sorted(self.shares.items()))
        parts = (self.participants, self.arrived, self.signatures, total, *shares)
        return message("begun", *parts, length=length, round=round).to_bytes()

    @staticmethod
    def from_bytes(written: bytes, length: int, round: int) -> _Stored:
        """Inverse of `to_bytes`. Raises AggregationError for another sum."""
        parts = read_message(written, "begun", None, length=length, round=round)
        participants, arrived, signatures, total, *shares = parts
        return _Stored(
            participants=participants,
            arrived=arrived,
            signatures=signatures,
            total=np.frombuffer(total, dtype="<u4").astype(np.uint32) if total else None,
            shares={int.from_bytes(each[:4], "big"): each[4:] for each in shares},
        )


@dataclass(frozen=True, kw_only=True)
class _Partners:
    """Who chose whom, from the shares that they gave."""

    participants: Participants
    shares: Mapping[int, bytes]  # by sender

    @cached_property
    def included(self) -> Members:
        """Those who gave shares."""
        return Members(indices=frozenset(self.shares))

    @cached_property
    def _sealed(self) -> dict[int, dict[int, bytes]]:
        """By receiver and sender."""
        sorted_out: dict[int, dict[int, bytes]] = {}
        for sender, written in sorted(self.shares.items()):
            for receiver, sealed, *_ in GIVEN.iter_unpack(written):
                sorted_out.setdefault(receiver, {})[sender] = sealed
        return sorted_out

    def for_receiver(self, index: int) -> bytes:
        """The encrypted shares for one participant."""
        return b"".join(SEALED.pack(sender, sealed) for sender, sealed in self._sealed.get(index, {}).items())

    def given_to(self, sender: int, receiver: int) -> tuple[int, bytes, bytes]:
        """Of the shares that a sender gave to a receiver: their number, and the digests of both kinds.

        Of its masking key, and of its own mask. Raises AggregationError if it gave none.
        """
        given = GIVEN.iter_unpack(self.shares.get(sender, b""))
        for number, (index, _, masking, own) in enumerate(given, start=1):
            if index == receiver:
                return number, masking, own
        raise AggregationError("reveals a share that it was not given")

    def senders_to(self, index: int) -> list[int]:
        """Those who gave a participant shares."""
        return list(self._sealed.get(index, {}))

    def of(self, index: int) -> frozenset[int]:
        """The participants with whom one that gave shares has a mask."""
        chosen = {receiver for receiver, *_ in GIVEN.iter_unpack(self.shares[index])}
        return self.included.indices & (chosen | set(self._sealed.get(index, {})))


class _Unmasking:
    """Collects shares, and removes from the sum of masked vectors the masks that do not cancel."""

    def __init__(self, partners: _Partners, survivors: Members) -> None:
        self._partners, self._survivors = partners, survivors
        self._own: dict[int, bytes] = {}  # secrets of own masks that survivors have given themselves
        self._shares: dict[int, dict[int, bytes]] = {}  # of whom -> number -> share

    def take(self, index: int, parts: tuple[bytes, ...]) -> None:
        """The answer of a survivor to the last exchange; what does not fit what was agreed before is left out.

        Raises AggregationError if something was left out, after the rest was taken.
        """
        own, written = parts
        everybody = self._partners.participants
        false: list[int] = []
        if digest(b"own mask", own) == everybody.keys[index].own_mask:
            self._own[index] = own
        else:
            false.append(index)
        for sender, (_, share) in entries(
            SHARE, written, len(everybody.keys), most=len(everybody.keys)
        ).items():
            number, masking, of_own = self._partners.given_to(sender, index)
            expected = of_own if sender in self._survivors.indices else masking
            if digest(b"share", share) == expected:
                self._shares.setdefault(sender, {})[number] = share
            else:
                false.append(sender)
        if false:
            names = ", ".join(everybody.keys[each].device.hex()[:16] for each in false)
            raise AggregationError(
                f"shares of the devices with the signing keys {names} are not those that were announced: these devices "
                "or this one gave false ones"
            )

    def unmask(self, total: Ring) -> None:
        """Remove, in place, each survivor's own mask and the masks that survivors share with others.

        Raises AggregationError with the participant whose secret cannot be recovered.
        """
        everybody, included = self._partners.participants, self._partners.included
        for index in sorted(self._survivors.indices):
            own = self._own[index] if index in self._own else self._joined(index)
            if digest(b"own mask", own) != everybody.keys[index].own_mask:
                raise AggregationError(self._blame(index, "its shares are not those of its own mask"))
            add_mask(total, everybody.own_mask_key(own, included, index), subtract=True)
        for index in sorted(included.indices - self._survivors.indices):
            masking = X25519PrivateKey.from_private_bytes(self._joined(index))
            if public_bytes(masking) != everybody.keys[index].masking:
                raise AggregationError(self._blame(index, "its shares are not those of its masking key"))
            for other in sorted(self._partners.of(index) & self._survivors.indices):
                secret = shared_secret(masking, everybody.keys[other].masking)
                key = everybody.mask_key(secret, included, index, other)
                add_mask(total, key, subtract=other < index)

    def _joined(self, index: int) -> bytes:
        everybody = self._partners.participants
        try:
            return join(self._shares.get(index, {}), everybody.graph.threshold)
        except AggregationError as error:
            raise AggregationError(self._blame(index, str(error))) from error

    def _blame(self, index: int, problem: str) -> str:
        device = self._partners.participants.keys[index].device.hex()[:16]
        return f"the masks of the device with the signing key {device}... cannot be removed: {problem}"
