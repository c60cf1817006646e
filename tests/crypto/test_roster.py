import pytest

from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.keys import verification_key
from privfed.crypto.roster import Identity, Roster, accept, load_roster, sign_roster

from .consortium import IDENTITIES, ROSTER

OFFLINE = b"\5" * 32
AUTHORITY = verification_key(OFFLINE)
NEXT = Roster(version=2, previous=ROSTER.hash, members=ROSTER.members[:-1])


def test_a_site_moves_only_along_the_signed_chain() -> None:
    first = accept(sign_roster(ROSTER, OFFLINE), authority=AUTHORITY, pinned=None)
    assert first == ROSTER
    assert accept(sign_roster(ROSTER, OFFLINE), authority=AUTHORITY, pinned=first) == ROSTER
    second = accept(sign_roster(NEXT, OFFLINE), authority=AUTHORITY, pinned=first)
    assert second == NEXT and second.hash != first.hash
    third = Roster(version=3, previous=b"\1" * 32, members=ROSTER.members)
    for offered, pinned in ((ROSTER, second), (third, second), (third, first)):
        with pytest.raises(RemoteProtocolError, match="does not follow"):
            accept(sign_roster(offered, OFFLINE), authority=AUTHORITY, pinned=pinned)


def test_an_altered_roster_or_a_strangers_signature_is_refused() -> None:
    data = sign_roster(ROSTER, OFFLINE)
    for position in range(0, len(data), 7):
        altered = bytearray(data)
        altered[position] ^= 1
        with pytest.raises(RemoteProtocolError):
            load_roster(bytes(altered), AUTHORITY)
    with pytest.raises(RemoteProtocolError):
        load_roster(sign_roster(ROSTER, b"\6" * 32), AUTHORITY)


def test_names_and_keys_are_unique() -> None:
    one = IDENTITIES[0].member
    with pytest.raises(ValueError, match="different"):
        Roster(version=1, previous=bytes(32), members=(one, one))


def test_no_repr_shows_a_secret() -> None:
    identity = Identity.generate("hospital")
    assert identity.secagg_private.hex() not in repr(identity) and repr(identity) == "Identity(name='hospital')"


def test_what_every_client_asks_of_a_roster_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    roster = Roster(version=1, previous=bytes(32), members=ROSTER.members)
    first = roster.hash
    monkeypatch.setattr("privfed.crypto.roster.digest", None)  # a second hash would call it
    assert roster.hash == first == ROSTER.hash
    assert [roster.index_of(member.secagg_key) for member in ROSTER.members] == list(range(len(ROSTER.members)))
    with pytest.raises(ValueError, match="not in the roster"):
        roster.index_of(bytes(32))
    longer = Roster(version=2, previous=first, members=(*ROSTER.members, Identity.generate("another").member))
    assert longer.index_of(longer.members[-1].secagg_key) == len(ROSTER.members)
