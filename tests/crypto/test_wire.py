"""One message, one form: the decoder measures the canonical encoding instead of making it."""

import struct

import msgspec
import pytest

from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.masking import messages as m
from privfed.crypto.plain import Invitation, Submission
from privfed.crypto.wire import decode, encode

MASKED = (
    m.Start,
    m.Advertise,
    m.Members,
    m.Deal,
    m.Delivery,
    m.MaskedInput,
    m.Survivors,
    m.Consent,
    m.Reveal,
    m.Shares,
)
KINDS: list[type[msgspec.Struct]] = [*MASKED, Invitation, Submission]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 31, 32, 255, 256, 65535, 65536])
def test_what_is_encoded_is_decoded(kind: type[msgspec.Struct], size: int) -> None:
    message = kind(*[bytes(size)] * len(kind.__struct_fields__))
    assert decode(encode(message), kind, most=10**6) == message


def test_every_longer_form_of_a_header_is_refused() -> None:
    tag, sid = b"secagg/1 start", bytes(range(32))
    arrays = [b"\x92", b"\xdc" + struct.pack(">H", 2), b"\xdd" + struct.pack(">I", 2)]
    size = len(tag)
    tags = [
        bytes([0xA0 + size]),
        b"\xd9" + bytes([size]),
        b"\xda" + struct.pack(">H", size),
        b"\xdb" + struct.pack(">I", size),
    ]
    fields = [b"\xc4\x20", b"\xc5" + struct.pack(">H", 32), b"\xc6" + struct.pack(">I", 32)]
    accepted = 0
    for array in arrays:
        for string in tags:
            for field in fields:
                data = array + string + tag + field + sid
                if data == encode(m.Start(sid=sid)):
                    assert decode(data, m.Start, most=1000).sid == sid
                    accepted += 1
                    continue
                with pytest.raises(RemoteProtocolError):
                    decode(data, m.Start, most=1000)
    assert accepted == 1


@pytest.mark.parametrize("other", [msgspec.msgpack.Ext(1, bytes(32)), "a" * 32, None, 5, [1], {"a": 1}, True, 1.5])
def test_only_byte_strings_are_byte_strings(other: object) -> None:
    # A string has a shorter header than bytes of its length and could hide a longer one elsewhere.
    data = msgspec.msgpack.encode(["secagg/1 start", other])
    with pytest.raises(RemoteProtocolError):
        decode(data, m.Start, most=1000)
