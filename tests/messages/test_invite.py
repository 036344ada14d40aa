"""An invitation's code is read back exactly, and not with a typing error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedface.errors import ConfigError
from fedface.messages.invite import Invite

INVITE = Invite(
    address="fedface.example.org:8443",
    authority=bytes(range(32)),
    operator=bytes(range(32, 64)),
    plan=bytes(range(64, 96)),
    token=bytes(range(96, 112)),
)
PARTS = {name: st.binary(min_size=32, max_size=32) for name in ("authority", "operator", "plan")}


@given(
    st.builds(
        Invite, address=st.text(min_size=1, max_size=80), token=st.binary(min_size=16, max_size=16), **PARTS
    )
)
def test_the_code_holds_every_part(invite: Invite) -> None:
    """In lower case and in lines as well."""
    assert Invite.from_code(invite.code()) == invite
    lines = "\n".join(invite.code()[start : start + 40] for start in range(0, len(invite.code()), 40))
    assert Invite.from_code(f"  {lines.lower()}\n") == invite


def test_a_code_is_short_enough_for_a_qr_code_of_letters_and_digits() -> None:
    """At most 300 characters of its alphanumeric mode."""
    assert len(INVITE.code()) <= 300
    assert set(INVITE.code()) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")


@pytest.mark.parametrize("place", range(9, 230, 13))
def test_a_mistyped_character_is_noticed(place: int) -> None:
    code = INVITE.code()
    other = "A" if code[place] != "A" else "B"
    with pytest.raises(ConfigError, match="incomplete or mistyped"):
        Invite.from_code(code[:place] + other + code[place + 1 :])


@pytest.mark.parametrize(
    "text", ["", "hello", "FEDFACE1-", "FEDFACE1", "FEDFACE2-AAAA", "https://example.org"]
)
def test_another_text_is_not_an_invitation(text: str) -> None:
    with pytest.raises(ConfigError, match="expected an invitation"):
        Invite.from_code(text)


@pytest.mark.parametrize("length", [10, 50, 200, 229])
def test_a_code_cut_short_is_noticed(length: int) -> None:
    with pytest.raises(ConfigError, match="incomplete or mistyped"):
        Invite.from_code(INVITE.code()[:length])
