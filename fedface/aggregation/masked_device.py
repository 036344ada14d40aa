"""The device's side of a masked sum (masked.py): one secret per round, from which every answer follows.

All keys, shares and masks are derived from 32 random bytes that are stored with the device's integers before anything
leaves, so a device that restarts gives the same answers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fedface.aggregation.mask_graph import choose_partners
from fedface.aggregation.masked import (
    DECRYPTS,
    GIVEN,
    KEY_BYTES,
    MAX_PARTICIPANTS,
    SEALED,
    SHARE,
    SUM_KEY,
    KeyMessage,
    Members,
    Participants,
    Residues,
    Ring,
    asked_before,
    derive,
    digest,
    entries,
    message,
    message_parts,
    public_bytes,
    read_message,
    settings,
    shared_secret,
)
from fedface.aggregation.payload import (
    AggregationParameters,
    Exchange,
    MaskSettings,
    OwnerTerms,
    Payload,
    SumContext,
)
from fedface.aggregation.shamir import SHARE_BYTES, split
from fedface.codec import decode
from fedface.errors import AggregationError
from fedface.tensor_types import Vector

# In the header of what is stored.
HONEST, SMALLEST, OWNER, SETTINGS = "honest", "smallest_cohort", "owner", "settings"

MAX_COHORT = (1 << 32) - 1
_NONCE = bytes(12)  # each key encrypts one message


@dataclass(frozen=True, kw_only=True)
class MaskedDevice:
    """One device in one sum.

    Guarantees, if at most `MaskGraph.corrupt` participants collude with the server:
        * The server learns the sum over survivors, and nothing else about this device's vector.
        * Each survivor's owner admits a sum of so few.
    """

    config: MaskSettings
    agreement: AggregationParameters
    ring: Ring
    context: SumContext | None  # of `protect`; the answers take it from what is stored
    signing: Ed25519PrivateKey
    owner: OwnerTerms
    honest: int = 0  # for `protect`: devices of whose shares of noise the sum depends; 0: noise is complete

    def protect(self, update: Vector, round: int) -> Payload:
        """What stays on the device: a new secret, and the update (d,) as integers of the grid.

        Raises AggregationError if the update is not finite or not a vector.
        """
        if self.context is None or self.context.round != round:
            raise AggregationError(f"a vector of round {round} needs to know what its sum is of")
        written = self.ring.write(self.ring.to_ring(update))
        secret = secrets.token_bytes(KEY_BYTES)
        stored = message("stored", secret, written, length=len(update), round=round)
        kept = {
            **asdict(self.context), HONEST: self.honest, SMALLEST: self.owner.smallest_cohort, OWNER: self.owner.digest,
            SETTINGS: self._settings.hex(), SUM_KEY: self.ring.key,
        }  # fmt: skip
        return replace(stored, header={**kept, **stored.header})

    @property
    def _settings(self) -> bytes:
        return settings(self.config, self.agreement)

    def opening(self, stored: bytes) -> bytes:
        """What is sent first: this device's keys for this sum. After the last exchange, they are what is stored."""
        payload = Payload.from_bytes(stored)
        return stored if payload.header.get("exchange") == "keys" else self._sum(payload).keys().to_bytes()

    def closed(self, stored: bytes) -> bytes:
        """The keys alone: whoever takes the device later reads no update."""
        return self.opening(stored)

    def check_terms(self, stored: bytes) -> None:
        """What is closed has no vector any more, and passes."""
        if Payload.from_bytes(stored).header.get(OWNER, self.owner.digest) != self.owner.digest:
            raise AggregationError(
                "the owner has changed the policy since this vector was computed; nothing is sent"
            )

    def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes], stored: bytes) -> bytes:
        """The answer to one exchange.

        Args:
            exchange: Which one.
            requests: What was asked in it and in those before, one for each; another one must never be answered.
            stored: What `protect` returned, as bytes.

        Raises:
            AggregationError: A request is not one that an honest server sends; nothing may be sent.
        """
        if missing := [name for name in (*asked_before(exchange), exchange) if name not in requests]:
            raise AggregationError(f"this device was not asked for {missing[0]!r} before {exchange!r}")
        return self._sum(Payload.from_bytes(stored)).answer(exchange, requests).to_bytes()

    def _sum(self, stored: Payload) -> _DeviceSum:
        secret, integers = message_parts(stored, "stored", 2, length=stored.length, round=stored.round)
        context = decode(SumContext, {each.name: stored.header.get(each.name) for each in fields(SumContext)})
        if stored.header.get(SETTINGS) != self._settings.hex():
            raise AggregationError("this sum is asked for with other settings than its vectors were")
        if stored.header.get(SUM_KEY) != self.ring.key:
            raise AggregationError("the key for encrypted sums is not the one with which this sum was begun")
        return _DeviceSum(
            device=self,
            context=context,
            honest=stored.whole(HONEST, least=0, most=MAX_PARTICIPANTS),
            smallest_cohort=stored.whole(SMALLEST, least=0, most=MAX_COHORT),
            secret=secret,
            length=stored.length,
            vector=self.ring.read(integers, stored.length),
        )


@dataclass(frozen=True, kw_only=True)
class _DeviceSum:
    """One device's secrets of one sum."""

    device: MaskedDevice
    context: SumContext
    honest: int  # how many devices' shares of noise the server must not know in the sum; 0: noise is complete
    smallest_cohort: int  # that the owner admits, as signed
    secret: bytes
    length: int
    vector: Residues

    def _private(self, purpose: bytes) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(derive(self.secret, purpose, self.context.digest))

    @cached_property
    def encryption(self) -> X25519PrivateKey:
        return self._private(b"encryption key")

    @cached_property
    def masking(self) -> X25519PrivateKey:
        return self._private(b"masking key")

    @cached_property
    def own(self) -> bytes:
        return derive(self.secret, b"own mask", self.context.digest)

    def _message(self, exchange: str, *parts: bytes) -> Payload:
        return message(exchange, *parts, length=self.length, round=self.context.round)

    @cached_property
    def key_message(self) -> KeyMessage:
        unsigned = KeyMessage(
            device=public_bytes(self.device.signing),
            encryption=public_bytes(self.encryption),
            masking=public_bytes(self.masking),
            own_mask=digest(b"own mask", self.own),
            smallest_cohort=self.smallest_cohort,
        )
        return unsigned.sign(self.device.signing, self.context)

    def keys(self) -> Payload:
        keys, ring = self._message("keys", self.key_message.to_bytes()), self.device.ring
        if not ring.key:
            return keys
        return replace(keys, header={**keys.header, SUM_KEY: ring.key, DECRYPTS: int(ring.decrypts)})

    def answer(self, exchange: Exchange, requests: Mapping[Exchange, bytes]) -> Payload:
        asked = {
            name: read_message(
                requests[name],
                name,
                {"shares": 1, "masked": 2, "survivors": 1, "decrypt": 1, "reveal": 2}[name],
                length=self.length,
                round=self.context.round,
            )
            for name in (*asked_before(exchange), exchange)
        }
        partners = _Partners(
            own=self,
            participants=Participants.from_bytes(asked["shares"][0], self.context, self.device.config),
        )
        if exchange == "shares":
            return self._message(exchange, partners.shares())
        included, received = partners.received(*asked["masked"])
        if exchange == "masked":
            signature = self.device.signing.sign(partners.participants.included_signed(included))
            return self._message(exchange, partners.masked(included, received), signature)
        survivors = partners.survivors(included, asked["survivors"][0])
        if exchange == "survivors":
            content = partners.participants.survivors_signed(included, survivors)
            return self._message(exchange, self.device.signing.sign(content))
        if exchange == "decrypt":
            ring = self.device.ring
            return self._message(exchange, ring.write(ring.decrypt(asked[exchange][0], self.length)))
        signed, masked = asked["reveal"]
        partners.check_signatures(included, survivors, signed)
        agreeing = partners.agreeing(included, masked)
        return self._message(exchange, self.own, partners.revealed(survivors, agreeing, received))


@dataclass(frozen=True, kw_only=True)
class _Partners:
    """One device among the participants of a sum."""

    own: _DeviceSum
    participants: Participants

    @cached_property
    def index(self) -> int:
        """This device's index. Raises AggregationError if its keys are not in the list."""
        keys = self.participants.keys
        found = [index for index, each in enumerate(keys) if each == self.own.key_message]
        if not found:
            raise AggregationError("the list of participants does not have this device's keys")
        return found[0]

    @cached_property
    def chosen(self) -> tuple[int, ...]:
        """The partners that this device chooses, at random: these get its shares, the n-th the share n + 1."""
        seed = derive(self.own.secret, b"partners", self.participants.digest)
        everybody = self.participants
        return choose_partners(len(everybody.keys), self.index, everybody.graph.partners, seed)

    def shares(self) -> bytes:
        """The encrypted shares of both secrets for the chosen partners."""
        everybody, graph = self.participants, self.participants.graph
        everybody.check_size()
        if graph.contributors < self.own.honest:
            raise AggregationError(
                f"a sum of these {len(everybody.keys)} devices may have the noise of only {graph.contributors} honest "
                f"ones, {self.own.honest} are needed; nothing was sent"
            )
        context = everybody.context
        for index in self.chosen:
            everybody.keys[index].check(context)
        both = [
            split(
                secret,
                holders=len(self.chosen),
                threshold=graph.threshold,
                seed=derive(self.own.secret, b"polynomial " + name, everybody.digest),
            )
            for name, secret in (
                (b"masking", self.own.masking.private_bytes_raw()),
                (b"own", self.own.own),
            )
        ]
        sealed = []
        for number, (index, *pair) in enumerate(zip(self.chosen, *both, strict=True), start=1):
            key = everybody.sealing_key(self.own.encryption, self.index, index, own=self.index)
            plain = number.to_bytes(2, "big") + b"".join(pair)
            checks = (digest(b"share", share) for share in pair)
            sealed.append(GIVEN.pack(index, AESGCM(key).encrypt(_NONCE, plain, None), *checks))
        return b"".join(sealed)

    def received(self, listed: bytes, sealed: bytes) -> tuple[Members, dict[int, bytes]]:
        """Those who gave shares, and what they gave this device, decrypted: number and both
        shares, or nothing where a sender did not encrypt them for this device.

        Raises:
            AggregationError: The list is too short for this device, or a sender is not in it.
        """
        everybody = self.participants
        included = Members.from_bytes(listed, len(everybody.keys))
        helpers = included.indices & set(self.chosen)
        if self.index not in included.indices or len(included.indices) < everybody.fewest:
            raise AggregationError("too few participants have given shares")
        if len(helpers) < everybody.graph.threshold:
            raise AggregationError("too few of this device's partners have given shares")
        opened: dict[int, bytes] = {}
        found = entries(SEALED, sealed, len(everybody.keys), most=len(everybody.keys))
        for sender, (ciphertext,) in found.items():
            if sender == self.index or sender not in included.indices:
                raise AggregationError("a share is of no one in the list")
            everybody.keys[sender].check(everybody.context)
            key = everybody.sealing_key(self.own.encryption, sender, self.index, own=self.index)
            try:
                opened[sender] = AESGCM(key).decrypt(_NONCE, ciphertext, None)
            except InvalidTag:  # it harms its sender alone, whose vector needs the masks of all that it chose
                opened[sender] = b""
        return included, opened

    def masked(self, included: Members, received: Mapping[int, bytes]) -> bytes:
        """The vector with all masks, little-endian."""
        everybody = self.participants
        ring, total = self.own.device.ring, self.own.vector.copy()
        ring.add_mask(total, everybody.own_mask_key(self.own.own, included, self.index))
        for other in sorted((included.indices & set(self.chosen)) | set(received)):
            secret = shared_secret(self.own.masking, everybody.keys[other].masking)
            key = everybody.mask_key(secret, included, self.index, other)
            ring.add_mask(total, key, subtract=other < self.index)
        return ring.send(total, self.own.length)

    def survivors(self, included: Members, listed: bytes) -> Members:
        """The survivors. Raises AggregationError if this device must not help to reveal their sum."""
        survivors = Members.from_bytes(listed, len(self.participants.keys))
        if self.index not in survivors.indices:
            raise AggregationError("this device is not among the survivors")
        self.participants.check_survivors(included, survivors)
        if len(survivors.indices & set(self.chosen)) < self.participants.graph.threshold:
            # They alone hide its vector.
            raise AggregationError("too few of this device's partners have survived")
        return survivors

    def check_signatures(self, included: Members, survivors: Members, written: bytes) -> None:
        """Raises AggregationError unless enough survivors have signed these two lists."""
        everybody = self.participants
        content = everybody.survivors_signed(included, survivors)
        signed = everybody.signers(written, content, "a participant has not signed these survivors")
        if not survivors.indices >= signed or len(signed) < everybody.fewest:
            raise AggregationError(
                f"{len(signed)} participants have signed the list of survivors, {everybody.fewest} must"
            )

    def agreeing(self, included: Members, written: bytes) -> frozenset[int]:
        """The participants that masked their vectors for the same list of those who gave shares.

        Raises AggregationError if a signature is wrong.
        """
        content = self.participants.included_signed(included)
        return self.participants.signers(written, content, "a participant has masked for other participants")

    def revealed(self, survivors: Members, agreeing: frozenset[int], received: Mapping[int, bytes]) -> bytes:
        """For each who gave this device shares: of a survivor that of its own mask, else that of its masking key."""
        shown = []
        for sender, plain in sorted(received.items()):
            if not plain or (sender in survivors.indices and sender not in agreeing):
                continue
            number, masking, own = plain[:2], plain[2 : 2 + SHARE_BYTES], plain[2 + SHARE_BYTES :]
            share = own if sender in survivors.indices else masking
            shown.append(SHARE.pack(sender, number, share))
        return b"".join(shown)
