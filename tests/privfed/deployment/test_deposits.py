"""Deposits: they open once, at who left them, as they were."""

from pathlib import Path

import pytest

from privfed.crypto.journal import JournalFile
from privfed.deployment.deposits import DepositRefused, Deposits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_the_last_deposit_opens_once(path: Path) -> None:
    deposits = Deposits(JournalFile(path), "north")
    first = deposits.leave(b"one", about=b"a")
    assert deposits.out
    assert Deposits(JournalFile(path), "north").fetch(first) == b"one"
    assert not deposits.out
    with pytest.raises(DepositRefused, match="had it back"):
        deposits.fetch(first)


def test_an_earlier_deposit_does_not_open_and_spoils_the_last(path: Path) -> None:
    deposits = Deposits(JournalFile(path), "north")
    first, last = deposits.leave(b"one", about=b"a"), deposits.leave(b"two", about=b"a")
    with pytest.raises(DepositRefused, match="left last"):
        deposits.fetch(first)
    with pytest.raises(DepositRefused):
        deposits.fetch(last)


def test_any_byte_altered_is_refused(path: Path) -> None:
    deposits = Deposits(JournalFile(path), "north")
    for at in range(len(deposits.leave(b"content", about=b""))):
        altered = bytearray(deposits.leave(b"content", about=b""))
        altered[at] ^= 1 << at % 8
        with pytest.raises(DepositRefused):
            deposits.fetch(bytes(altered))
    for cut in (b"", b"x", deposits.leave(b"content", about=b"")[:-1]):
        deposits.leave(b"content", about=b"")
        with pytest.raises(DepositRefused):
            deposits.fetch(cut)


def test_a_deposit_is_bound_to_who_left_it_to_its_number_and_to_what_it_is_about(path: Path) -> None:
    def same_key(size: int) -> bytes:
        return bytes(size)

    north, south = (Deposits(JournalFile(path), name, same_key) for name in ("north", "south"))
    for other, about, again in [(south, b"a", 0), (north, b"b", 0), (north, b"a", 1)]:
        left = north.leave(b"content", about=b"a")
        for _ in range(1 + again):
            other.leave(b"content", about=about)
        with pytest.raises(DepositRefused):
            other.fetch(left)
    left = north.leave(b"content", about=b"a")
    assert north.fetch(left) == b"content"


def test_two_deposits_of_the_same_never_look_alike(path: Path) -> None:
    deposits = Deposits(JournalFile(path), "north")
    assert len({deposits.leave(b"content", about=b"a") for _ in range(20)}) == 20


@pytest.mark.parametrize("how", ["fetched", "given up", "replaced"])
def test_a_key_that_is_used_up_is_in_no_file(path: Path, how: str) -> None:
    key = bytes(range(100, 132))
    draws = iter([key, bytes(32)])
    deposits = Deposits(JournalFile(path), "north", lambda size: next(draws))
    left = deposits.leave(b"content", about=b"a")
    assert key in path.read_bytes() and path.stat().st_mode & 0o777 == 0o600
    match how:
        case "fetched":
            deposits.fetch(left)
        case "given up":
            deposits.give_up()
            assert not deposits.out
        case "replaced":
            deposits.leave(b"content", about=b"a")
    assert not any(key in file.read_bytes() for file in path.parent.iterdir())


def test_a_file_that_others_may_read_is_refused(path: Path) -> None:
    Deposits(JournalFile(path), "north")
    path.chmod(0o640)
    with pytest.raises(PermissionError):
        Deposits(JournalFile(path), "north")
