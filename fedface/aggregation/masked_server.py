"""The server's side of a masked sum (masked.py): it passes lists and shares on, adds masked vectors, removes masks.

It has no key. What it must not lose is written to a file before devices are asked, since they answer each exchange for
one request only: a server that restarts asks the same again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedface.aggregation.masked import (
    DECRYPTS,
    GIVEN,
    SEALED,
    SHARE,
    SIGNATURE,
    SUM_KEY,
    KeyMessage,
    Members,
    Participants,
    Residues,
    Ring,
    digest,
    entries,
    message,
    message_parts,
    public_bytes,
    read_message,
    shared_secret,
    verify,
)
from fedface.aggregation.payload import Exchange, MaskSettings, Payload, SumContext
from fedface.aggregation.shamir import join
from fedface.aggregation.sums import Request, SumResult
from fedface.atomic_io import replace_bytes
from fedface.errors import AggregationError


class MaskedServer:
    """One masked sum."""

    def __init__(
        self,
        config: MaskSettings,
        ring: Ring,
        context: SumContext,
        length: int,
        *,
        stored: Path | None = None,
        fewest: int = 1,
    ) -> None:
        """The sum of vectors (`length`,); one that was begun and is stored in that file is continued.

        Raises AggregationError if the file is not one of this sum.
        """
        self._ring = ring
        self._config, self._context, self._length, self._file = config, context, length, stored
        self._fewest = fewest
        self._keys: dict[int, KeyMessage] = {}
        self._sum_keys: dict[int, str] = {}  # names of the keys with which members encrypt
        self._decrypting: set[int] = set()  # members with the secret key
        self._taken: set[bytes] = set()  # every key that a participant has
        self._probe = X25519PrivateKey.generate()
        self._state = _Stored()
        if stored is not None and stored.exists():
            self._state = _Stored.from_bytes(stored.read_bytes(), length, context.round)

    @cached_property
    def _everybody(self) -> Participants:
        return Participants.from_bytes(self._state.participants, self._context, self._config)

    @cached_property
    def _indices(self) -> dict[KeyMessage, int]:
        return {keys: index for index, keys in enumerate(self._everybody.keys)}

    @property
    def _members(self) -> dict[int, int]:
        """By index."""
        return {self._indices[keys]: member for member, keys in self._keys.items()}

    def accept(self, member: int, payload: Payload, device: str) -> None:
        """Take a device's keys. Raises AggregationError with what is wrong with them."""
        (written,) = message_parts(payload, "keys", 1, length=self._length, round=self._context.round)
        keys = KeyMessage.from_bytes(written)
        keys.check(self._context)
        if keys.device in self._taken:
            raise AggregationError("another device has the same signing key; give each its own state folder")
        if keys.encryption == keys.masking or {keys.encryption, keys.masking} & self._taken:
            raise AggregationError("its keys are those of another device, or equal")
        for key in (keys.encryption, keys.masking):
            shared_secret(self._probe, key)  # of small order: every partner would stop
        if self._state.participants and keys not in self._indices:
            raise AggregationError("the sum of this round was begun without this device")
        self._keys[member] = keys
        self._sum_keys[member] = str(payload.header.get(SUM_KEY, ""))
        if payload.header.get(DECRYPTS) == 1:
            self._decrypting.add(member)
        self._taken |= {keys.device, keys.encryption, keys.masking}

    def close(self) -> Mapping[int, str]:
        """Those that encrypt with another key than most, and whose owners demand larger sums than there can be."""
        left: dict[int, str] = {}
        if self._state.participants or not self._keys:
            return left
        (most, _), *others = Counter(self._sum_keys.values()).most_common()
        for member, name in self._sum_keys.items() if others else ():
            if name != most:
                del self._keys[member]
                left[member] = (
                    f"it encrypts with another key ({name}) than most devices; give it a copy of {most}"
                )
        while True:
            count = len(self._keys)
            greedy = [member for member, keys in self._keys.items() if keys.smallest_cohort > count]
            if not greedy:
                break
            for member in greedy:
                demanded = self._keys.pop(member).smallest_cohort
                left[member] = f"its owner demands a sum of {demanded} devices, {count} gave keys"
        return left

    def exchanges(self) -> Iterator[Request]:
        """What to ask the devices, one exchange after the other; the next is made from the answers.

        What was asked and answered before a restart is not asked again, or asked in the same words.

        Raises AggregationError if too few devices remain.
        """
        state = self._state
        if not state.participants:
            ordered = tuple(sorted(self._keys.values(), key=lambda keys: keys.device))
            begun = Participants(context=self._context, config=self._config, keys=ordered)
            begun.check_size()
            state.participants = begun.to_bytes()
            self._save()
        if not state.shares:
            yield from self._ask_shares()
        given = _GivenShares(participants=self._everybody, shares=state.shares)
        if not state.total:
            yield from self._ask_masked(given)
        survivors = Members(indices=frozenset(state.arrived))
        if not state.signatures:
            yield from self._ask_survivors(given.included, survivors)
        if self._ring.encrypted and not state.decrypted:
            yield from self._ask_decrypt(survivors)
        unmasking = _Unmasking(given, survivors)
        yield self._request(
            "reveal",
            {
                index: (_signatures(state.signatures), _signatures(state.arrived, given.senders_to(index)))
                for index in survivors.indices
            },
            unmasking.take,
        )
        total = self._ring.read(state.decrypted or state.total, self._length)
        unmasking.unmask(total, self._ring)
        members = self._members
        self._result = SumResult(
            total=self._ring.from_ring(total, self._length, len(survivors.indices)),
            members=frozenset(members[index] for index in survivors.indices if index in members),
            count=len(survivors.indices),
        )

    def _ask_shares(self) -> Iterator[Request]:
        partners = self._everybody.graph.partners
        given: dict[int, bytes] = {}

        def give(index: int, parts: tuple[bytes, ...]) -> None:
            found = entries(GIVEN, parts[0], len(self._everybody.keys), most=partners)
            if len(found) != partners or index in found:
                raise AggregationError(f"expected shares for {partners} others, got {len(found)}")
            given[index] = parts[0]

        yield self._request("shares", dict.fromkeys(self._members, (self._state.participants,)), give)
        self._check_enough(len(given), "gave shares")
        self._state.shares = given
        self._save()

    def _ask_masked(self, given: _GivenShares) -> Iterator[Request]:
        everybody, included = self._everybody, given.included
        total, arrived = self._ring.adder(self._length), dict[int, bytes]()
        agreed = everybody.included_signed(included)

        def add(index: int, parts: tuple[bytes, ...]) -> None:
            vector, signature = parts
            verify(everybody.keys[index].device, signature, agreed, "it has not signed the participants")
            total.add(vector)
            arrived[index] = signature

        passed_on = {index: (included.written, given.for_receiver(index)) for index in included.indices}
        yield self._request("masked", passed_on, add)
        everybody.check_survivors(included, Members(indices=frozenset(arrived)))
        if len(arrived) < self._fewest:
            raise AggregationError(f"{len(arrived)} vectors arrived, {self._fewest} are needed")
        self._state.total, self._state.arrived = total.to_bytes(), arrived
        self._save()

    def _ask_survivors(self, included: Members, survivors: Members) -> Iterator[Request]:
        everybody, signed = self._everybody, dict[int, bytes]()
        content = everybody.survivors_signed(included, survivors)

        def sign(index: int, parts: tuple[bytes, ...]) -> None:
            verify(everybody.keys[index].device, parts[0], content, "its signature of the survivors is wrong")
            signed[index] = parts[0]

        yield self._request("survivors", dict.fromkeys(survivors.indices, (survivors.written,)), sign)
        self._check_enough(len(signed), "signed the list of survivors")
        self._state.signatures = signed
        self._save()

    def _ask_decrypt(self, survivors: Members) -> Iterator[Request]:
        """Ask one survivor with the secret key after the other, until one decrypts the sum."""

        def take(index: int, parts: tuple[bytes, ...]) -> None:
            self._ring.read(parts[0], self._length)
            self._state.decrypted = parts[0]

        members = self._members
        holders = (index for index in survivors.indices if members.get(index) in self._decrypting)
        for index in sorted(holders, key=lambda index: members[index]):
            yield self._request("decrypt", {index: (self._state.total,)}, take)
            if self._state.decrypted:
                self._save()
                return
        raise AggregationError("no device with the secret key decrypted the sum")

    def result(self) -> SumResult:
        """The sum, after all exchanges."""
        return self._result

    def _check_enough(self, count: int, what: str) -> None:
        everybody = self._everybody
        if count < everybody.fewest:
            raise AggregationError(
                f"{count} of {len(everybody.keys)} devices {what}, {everybody.fewest} must; nothing was revealed"
            )

    def _request(
        self,
        exchange: Exchange,
        asked: Mapping[int, tuple[bytes, ...]],
        receive: Callable[[int, tuple[bytes, ...]], None],
    ) -> Request:
        """What to ask of those participants that are there; requests and answers are by index."""
        members = self._members
        indices = {member: index for index, member in members.items()}
        parts = 2 if exchange in ("masked", "reveal") else 1
        of_this = {"length": self._length, "round": self._context.round}

        def take(member: int, written: bytes) -> None:
            receive(indices[member], read_message(written, exchange, parts, **of_this))

        written = {  # one object for all that are asked the same
            content: message(exchange, *content, **of_this).to_bytes() for content in set(asked.values())
        }
        contents = {members[index]: written[asked[index]] for index in asked if index in members}
        return Request(exchange=exchange, contents=dict(sorted(contents.items())), receive=take)

    def _save(self) -> None:
        if self._file is not None:
            self._file.parent.mkdir(exist_ok=True, mode=0o700)
            replace_bytes(self._file, self._state.to_bytes(self._length, self._context.round))


def _signatures(signed: Mapping[int, bytes], of: Collection[int] | None = None) -> bytes:
    """Signatures by index as they are sent, of these participants or of all."""
    return b"".join(
        SIGNATURE.pack(index, signature)
        for index, signature in sorted(signed.items())
        if of is None or index in of
    )


@dataclass(kw_only=True)
class _Stored:
    """What a server needs in order to ask the same again."""

    participants: bytes = b""
    shares: dict[int, bytes] = field(default_factory=dict)  # as each sender gave them, by its index
    arrived: dict[int, bytes] = field(default_factory=dict)  # survivors' signatures of those who gave shares
    total: bytes = b""  # of the survivors' masked vectors, as they sent them
    signatures: dict[int, bytes] = field(default_factory=dict)  # of the list of survivors
    decrypted: bytes = b""  # the same total, where it was encrypted

    def to_bytes(self, length: int, round: int) -> bytes:
        """As a payload: participants, signatures, totals, then the shares of each sender behind its index."""
        shares = (index.to_bytes(4, "big") + written for index, written in sorted(self.shares.items()))
        signatures = _signatures(self.arrived), _signatures(self.signatures)
        parts = (self.participants, *signatures, self.total, self.decrypted, *shares)
        return message("begun", *parts, length=length, round=round).to_bytes()

    @staticmethod
    def from_bytes(written: bytes, length: int, round: int) -> _Stored:
        """Inverse of `to_bytes`. Raises AggregationError for another length or round."""
        parts = read_message(written, "begun", None, length=length, round=round)
        participants, arrived, signatures, total, decrypted, *shares = parts
        return _Stored(
            participants=participants,
            arrived=dict(SIGNATURE.iter_unpack(arrived)),
            signatures=dict(SIGNATURE.iter_unpack(signatures)),
            total=total,
            decrypted=decrypted,
            shares={int.from_bytes(each[:4], "big"): each[4:] for each in shares},
        )


class _Given(NamedTuple):
    """What one participant gave to another."""

    number: int  # of the shares
    sealed: bytes  # both shares, encrypted
    masking: bytes  # digest of the share of its masking key
    own: bytes  # digest of the share of its own mask


@dataclass(frozen=True, kw_only=True)
class _GivenShares:
    """Who chose whom as partners, from the shares that they gave."""

    participants: Participants
    shares: Mapping[int, bytes]  # by sender

    @cached_property
    def included(self) -> Members:
        """Those who gave shares."""
        return Members(indices=frozenset(self.shares))

    @cached_property
    def to(self) -> dict[int, dict[int, _Given]]:
        """By receiver and sender."""
        given: dict[int, dict[int, _Given]] = {}
        for sender, written in sorted(self.shares.items()):
            for number, (receiver, *rest) in enumerate(GIVEN.iter_unpack(written), start=1):
                given.setdefault(receiver, {})[sender] = _Given(number, *rest)
        return given

    def for_receiver(self, index: int) -> bytes:
        """The encrypted shares for one participant."""
        return b"".join(SEALED.pack(sender, given.sealed) for sender, given in self.senders_to(index).items())

    def senders_to(self, index: int) -> Mapping[int, _Given]:
        """Those who gave a participant shares."""
        return self.to.get(index, {})

    def partners_of(self, index: int) -> frozenset[int]:
        """The participants with whom one that gave shares has a mask."""
        chosen = {receiver for receiver, *_ in GIVEN.iter_unpack(self.shares[index])}
        return self.included.indices & (chosen | set(self.senders_to(index)))


class _Unmasking:
    """Collects shares, and removes from the sum of masked vectors the masks that do not cancel."""

    def __init__(self, given: _GivenShares, survivors: Members) -> None:
        self._given, self._survivors = given, survivors
        self._own: dict[int, bytes] = {}  # secrets of own masks that survivors have given themselves
        self._shares: dict[int, dict[int, bytes]] = {}  # of whom -> number -> share

    def take(self, index: int, parts: tuple[bytes, ...]) -> None:
        """The answer of a survivor to the last exchange; what does not fit what was agreed before is left out.

        Raises AggregationError if something was left out, after the rest was taken.
        """
        own, written = parts
        everybody = self._given.participants
        false: list[int] = []
        if digest(b"own mask", own) == everybody.keys[index].own_mask:
            self._own[index] = own
        else:
            false.append(index)
        given = self._given.senders_to(index)
        revealed = entries(SHARE, written, len(everybody.keys), most=len(everybody.keys))
        for sender, (_, share) in revealed.items():
            known = given.get(sender)
            announced = known and (known.own if sender in self._survivors.indices else known.masking)
            if known and digest(b"share", share) == announced:
                self._shares.setdefault(sender, {})[known.number] = share
            else:
                false.append(sender)
        if false:
            names = ", ".join(everybody.keys[each].device.hex()[:16] for each in false)
            raise AggregationError(
                f"shares of the devices with the signing keys {names} are not those that were announced: these devices "
                "or this one gave false ones"
            )

    def unmask(self, total: Residues, ring: Ring) -> None:
        """Remove, in place, each survivor's own mask and the masks that survivors share with others.

        Raises AggregationError with the participant whose secret cannot be recovered.
        """
        everybody, included = self._given.participants, self._given.included
        for index in sorted(self._survivors.indices):
            own = self._own[index] if index in self._own else self._joined(index)
            if digest(b"own mask", own) != everybody.keys[index].own_mask:
                raise AggregationError(self._blame(index, "its shares are not those of its own mask"))
            ring.add_mask(total, everybody.own_mask_key(own, included, index), subtract=True)
        for index in sorted(included.indices - self._survivors.indices):
            masking = X25519PrivateKey.from_private_bytes(self._joined(index))
            if public_bytes(masking) != everybody.keys[index].masking:
                raise AggregationError(self._blame(index, "its shares are not those of its masking key"))
            for other in sorted(self._given.partners_of(index) & self._survivors.indices):
                secret = shared_secret(masking, everybody.keys[other].masking)
                key = everybody.mask_key(secret, included, index, other)
                ring.add_mask(total, key, subtract=other < index)

    def _joined(self, index: int) -> bytes:
        everybody = self._given.participants
        try:
            return join(self._shares.get(index, {}), everybody.graph.threshold)
        except AggregationError as error:
            raise AggregationError(self._blame(index, str(error))) from error

    def _blame(self, index: int, problem: str) -> str:
        device = self._given.participants.keys[index].device.hex()[:16]
        return f"the masks of the device with the signing key {device}... cannot be removed: {problem}"
