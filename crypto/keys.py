"""X25519, HKDF-SHA256, ChaCha20-Poly1305, Poly1305 and Ed25519 in the one way this layer uses each.

Keys are raw bytes: 32 for every key, 64 for a signature.
Sources: RFC 7748 §5 and §6.1, RFC 5869, RFC 8439 §2.5 and §2.8, RFC 8032 §5.1.
"""

from collections.abc import Callable

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.poly1305 import Poly1305

from .digest import digest
from .errors import RemoteProtocolError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16

# Every sealing key is derived for one direction of one pair in one session and seals one box: no nonce repeats.
_NONCE = bytes(12)


class ExchangeKey:
    """An X25519 private key, parsed once: parsing costs as much as an agreement (RFC 7748 §6.1). Its repr is bare."""

    def __init__(self, private: bytes) -> None:
        self._key = X25519PrivateKey.from_private_bytes(private)

    @property
    def public(self) -> bytes:
        """The 32-byte public key."""
        return self._key.public_key().public_bytes_raw()

    def agree(self, peer_public: bytes) -> bytes:
        """The 32-byte shared secret.

        Raises:
            RemoteProtocolError: the peer's key has low order, so the secret would be all zeros and known to everyone
                (RFC 7748 §6.1).
        """
        try:
            return self._key.exchange(X25519PublicKey.from_public_bytes(peer_public))
        except ValueError:
            raise RemoteProtocolError("a peer's X25519 key is not valid") from None


def derive(secret: bytes, *, salt: bytes, info: bytes, size: int = KEY_BYTES) -> bytes:
    """HKDF-SHA256 (RFC 5869): `size` bytes bound to salt and info."""
    return HKDF(algorithm=SHA256(), length=size, salt=salt, info=info).derive(secret)


def seal(key: bytes, plaintext: bytes, *, bound_to: bytes) -> bytes:
    """ChaCha20-Poly1305 with a zero nonce: for keys that seal exactly one box (RFC 8439 §2.8)."""
    return ChaCha20Poly1305(key).encrypt(_NONCE, plaintext, bound_to)


def open_sealed(key: bytes, box: bytes, *, bound_to: bytes) -> bytes:
    """The plaintext of `seal`.

    Raises:
        RemoteProtocolError: wrong key, box or context; which one is never told.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(_NONCE, box, bound_to)
    except InvalidTag:
        raise RemoteProtocolError("a sealed box does not open") from None


def one_time_tag(key: bytes, data: bytes | memoryview) -> bytes:
    """Poly1305 (RFC 8439 §2.5), four times as fast here as SHA-256: for keys that tag exactly one message.

    **Guarantees**: whoever does not know the key finds the tag of another message of up to L bytes, or two messages
    chosen without it share a tag, with probability at most 8⌈L/16⌉/2^106 (Bernstein 2005): below 2^-74 up to 8 GB.
    Whoever knows the key can forge: it convinces its holders and nobody else.
    """
    return Poly1305.generate_tag(key, data)


def check_one_time_tag(key: bytes, tag: bytes, data: bytes | memoryview) -> None:
    """Returns only if the tag is that of `one_time_tag`; compared in constant time.

    Raises:
        RemoteProtocolError: wrong key, tag or data.
    """
    try:
        Poly1305.verify_tag(key, data, tag)
    except InvalidSignature:
        raise RemoteProtocolError("a tag does not verify") from None


def verification_key(private: bytes) -> bytes:
    """The Ed25519 public key of a 32-byte private key (RFC 8032 §5.1.5)."""
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


class SigningKey:
    """An Ed25519 private key, parsed once: parsing costs as much as a signature. Its repr is bare."""

    def __init__(self, private: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(private)

    def sign(self, statement: bytes) -> bytes:
        """A 64-byte signature. Deterministic, so a replayed answer is byte-identical (RFC 8032 §5.1.6)."""
        return self._key.sign(statement)


def sign(private: bytes, statement: bytes) -> bytes:
    """One signature of `SigningKey`."""
    return SigningKey(private).sign(statement)


Verify = Callable[[bytes, bytes, bytes], None]
"""(public key, signature, statement): returns only if the signature is valid. `verify` is one."""


def verify(public: bytes, signature: bytes, statement: bytes) -> None:
    """Returns only if the signature is valid.

    Raises:
        RemoteProtocolError: wrong key, signature or statement.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement)
    except (InvalidSignature, ValueError):
        raise RemoteProtocolError("a signature does not verify") from None


class MemoisedVerify:
    """`verify` that remembers what it found valid: for simulations, in which one process plays every client.

    There the n clients check the same n signatures; a party on its own gains nothing from it. Remembers 32 bytes a
    signature, and after a hundred thousand of them begins anew.
    """

    _MOST = 100_000

    def __init__(self) -> None:
        self._valid: set[bytes] = set()

    def __call__(self, public: bytes, signature: bytes, statement: bytes) -> None:
        question = digest("verified", public, signature, statement)
        if question not in self._valid:
            verify(public, signature, statement)
            if len(self._valid) >= self._MOST:
                self._valid.clear()
            self._valid.add(question)
