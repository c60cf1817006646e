"""Known answers through our own wrappers, never beside them."""

import pytest
from cryptography.hazmat.primitives.poly1305 import Poly1305

from privfed.crypto import keys
from privfed.crypto.errors import RemoteProtocolError


def test_x25519_matches_rfc_7748_section_6_1() -> None:
    alice_public = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    bob_private = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    bob_public = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    assert keys.ExchangeKey(bob_private).public == bob_public
    assert keys.ExchangeKey(bob_private).agree(alice_public) == shared


@pytest.mark.parametrize("low_order", [bytes(32), b"\1" + bytes(31), b"short"])
def test_x25519_refuses_keys_that_give_an_all_zero_secret(low_order: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        keys.ExchangeKey(b"\7" * 32).agree(low_order)


def test_hkdf_matches_rfc_5869_case_1() -> None:
    okm = keys.derive(bytes([0x0B] * 22), salt=bytes(range(13)), info=bytes(range(0xF0, 0xFA)), size=42)
    assert okm.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_sealing_matches_rfc_8439() -> None:
    # Appendix A.1, vectors 1 and 2: blocks 0 and 1 of the zero key under the zero nonce. Block 0 keys Poly1305, block 1
    # is the first of the keystream (§2.8), so sealing 64 zero bytes shows both.
    block_0 = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    block_1 = bytes.fromhex(
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )
    box = keys.seal(bytes(32), bytes(64), bound_to=b"sixteen bytes ad")
    lengths = (16).to_bytes(8, "little") + (64).to_bytes(8, "little")
    assert box[:64] == block_1
    assert box[64:] == Poly1305.generate_tag(block_0, b"sixteen bytes ad" + block_1 + lengths)
    assert keys.open_sealed(bytes(32), box, bound_to=b"sixteen bytes ad") == bytes(64)


def test_a_box_opens_only_unaltered_under_its_key_and_context() -> None:
    box = keys.seal(bytes(32), b"text", bound_to=b"context")
    for key, altered, context in (
        (b"\1" * 32, box, b"context"),
        (bytes(32), box[:-1] + bytes([box[-1] ^ 1]), b"context"),
        (bytes(32), box, b"other"),
        (bytes(32), b"", b"context"),
    ):
        with pytest.raises(RemoteProtocolError, match=r"^a sealed box does not open$"):
            keys.open_sealed(key, altered, bound_to=context)


def test_ed25519_matches_rfc_8032_test_1() -> None:
    private = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    public = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert keys.verification_key(private) == public
    assert keys.sign(private, b"") == signature
    keys.verify(public, signature, b"")
    for bad in (signature[:-1], bytes(64)):
        with pytest.raises(RemoteProtocolError):
            keys.verify(public, bad, b"")
    with pytest.raises(RemoteProtocolError):
        keys.verify(public, signature, b"other")
