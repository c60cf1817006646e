"""What goes from hand to hand before the first run: the consortium's terms, a site's request, the kit it gets back.

All are signed, and nothing in them is secret: no private key is ever in one.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from privfed.architecture import Schema
from privfed.config import Target
from privfed.crypto import keys
from privfed.crypto.digest import digest
from privfed.crypto.errors import RemoteProtocolError
from privfed.crypto.roster import Identity, Member
from privfed.data.columns import input_names, input_ranges
from privfed.data.tables import Table

from .files import DeploymentError

NAME = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$"
Name = Annotated[str, Meta(pattern=NAME)]
Hex32 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
TERMS, SIGNATURE, ROSTER, CERTIFICATE, MEMBER = (
    "consortium.toml",
    "consortium.sig",
    "roster",
    "signed.zip",
    "member.json",
)
FLARE_REQUEST = "request.zip"
EngineName = Literal["nvflare", "flower"]
_MOST_BYTES = 16 * 2**20
_MOST_BACKUP = 4 * 2**30


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """consortium.toml: what all parties know of each other and of the table they agreed on.

    Args:
        contact: whom a site calls.
        host, port: where the coordinator's server is reached, over TLS; the one port there is.
        authority: Ed25519 key of who signs rosters, offline.
        coordinator: Ed25519 key that the coordinator signs its own book with.
        ca: fingerprint of the certificate authority; empty over Flower, whose federation has its own.
        engine: what carries the messages.
        data: the agreed columns, ranges and classes; each site's file is its own affair.
        task: what is predicted.
    """

    name: Name
    contact: str
    host: str
    port: Annotated[int, Meta(ge=1, le=65535)]
    authority: Hex32
    coordinator: Hex32
    ca: str
    engine: EngineName = "nvflare"
    data: Table
    task: Target


def require_name(name: str, whose: str) -> None:
    """Return if a party or a consortium may have this name: it stands in certificates and names files.

    Raises:
        DeploymentError: it may not; says what a name is made of.
    """
    if re.fullmatch(NAME.removeprefix("^").removesuffix("$"), name) is None:
        raise DeploymentError(f"{whose} can not be named {name!r}: take letters, digits and hyphens, 63 at most")


def require_engine(found: EngineName, needed: EngineName) -> None:
    """Return if a consortium has the engine that a command is about. Raises `DeploymentError`, saying what to do."""
    if found != needed:
        raise DeploymentError(
            "this consortium's messages go over Flower: start it with Flower's own commands, as docs/flower.md has them"
            if found == "flower"
            else "this consortium's messages go over NVIDIA FLARE: start it with privfed coordinator and privfed site"
        )


def schema_of(terms: Terms) -> Schema:
    """What the agreed table comes to, for the model."""
    columns = terms.data.columns
    return Schema(len(input_names(columns)), len(terms.data.classes), input_ranges(columns))


def agreed(data: Table) -> Table:
    """What a consortium agrees on of a table: not where or what a file is, nor how sites are told apart."""
    given = {name: getattr(data, name) for name in Table.__struct_fields__}
    own = {"file": None, "files": {"": ""}, "site": None, "minimum_records": 1}
    return Table(**given | own | {"maximum_rows": Table.__struct_defaults__[-1]})


class _Application(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """member.json: who asks to take part, signed with both of its keys: nobody can ask with another's."""

    name: Name
    organisation: Name
    contact: str
    secagg_key: Hex32
    ledger_key: Hex32
    request_sha256: Hex32
    secagg_signature: str = ""
    ledger_signature: str = ""

    @property
    def statement(self) -> bytes:
        bare = msgspec.structs.replace(self, secagg_signature="", ledger_signature="")
        return digest("privfed/application/1", msgspec.json.encode(bare))


class Applicant(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A party whose request was read and whose signatures hold."""

    name: Name
    organisation: Name
    contact: str
    secagg_key: Hex32
    ledger_key: Hex32

    @property
    def member(self) -> Member:
        return Member(self.name, bytes.fromhex(self.secagg_key), bytes.fromhex(self.ledger_key))

    @property
    def fingerprint(self) -> str:
        """What is read out on the telephone."""
        return fingerprint(bytes.fromhex(self.secagg_key + self.ledger_key))


def fingerprint(key: bytes) -> str:
    """Sixteen bytes of a key's digest in groups of four digits: long enough that nobody finds another with it."""
    text = digest("privfed/fingerprint/1", key).hex()[:32]
    return " ".join(text[at : at + 4] for at in range(0, 32, 4))


def application(identity: Identity, *, organisation: str, contact: str, flare_request: bytes) -> bytes:
    """The request file of a site."""
    member = identity.member
    bare = _Application(
        name=identity.name,
        organisation=organisation,
        contact=contact,
        secagg_key=member.secagg_key.hex(),
        ledger_key=member.ledger_key.hex(),
        request_sha256=digest("privfed/flare-request/1", flare_request).hex(),
    )
    signed = msgspec.structs.replace(
        bare,
        secagg_signature=keys.sign(identity.secagg_private, bare.statement).hex(),
        ledger_signature=keys.sign(identity.ledger_private, bare.statement).hex(),
    )
    return pack({MEMBER: msgspec.json.encode(signed), FLARE_REQUEST: flare_request})


def read_application(body: bytes) -> tuple[Applicant, bytes]:
    """Who asks, and the request for a certificate that belongs to it.

    Raises:
        DeploymentError: it is no request, or not signed by the keys that it names.
    """
    parts = unpack(body, (MEMBER, FLARE_REQUEST))
    try:
        asked = msgspec.json.decode(parts[MEMBER], type=_Application)
        for key, signature in (
            (asked.secagg_key, asked.secagg_signature),
            (asked.ledger_key, asked.ledger_signature),
        ):
            keys.verify(bytes.fromhex(key), bytes.fromhex(signature), asked.statement)
    except (ValueError, RemoteProtocolError):
        raise DeploymentError("this is no request of a site, or it was changed on its way: ask for it again") from None
    if digest("privfed/flare-request/1", parts[FLARE_REQUEST]).hex() != asked.request_sha256:
        raise DeploymentError("the request for a certificate is not the one that the site signed: ask for it again")
    names = Applicant.__struct_fields__
    return Applicant(**{name: getattr(asked, name) for name in names}), parts[FLARE_REQUEST]


def sign_terms(text: bytes, authority_private: bytes) -> bytes:
    return keys.sign(authority_private, digest("privfed/consortium/1", text))


def check_terms(text: bytes, signature: bytes, authority: bytes) -> None:
    """Return if the consortium's authority signed these terms. Raises `DeploymentError`."""
    try:
        keys.verify(authority, signature, digest("privfed/consortium/1", text))
    except RemoteProtocolError:
        raise DeploymentError(
            "the consortium's terms are not signed by the authority that you named: do not go on; call the coordinator"
        ) from None


def pack(parts: Mapping[str, bytes]) -> bytes:
    """Files of one hand-over, as a zip file."""
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return body.getvalue()


def unpack(body: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """Exactly these files; nothing is ever extracted under a name that the archive chose."""
    parts = _parts(body, _MOST_BYTES)
    if sorted(parts) != sorted(names):
        raise DeploymentError(f"this is not a file with {', '.join(names)}: ask for it again")
    return parts


def unpack_any(body: bytes) -> dict[str, bytes]:
    """Whatever files there are, by the names that the archive chose: to be looked at before one is written."""
    return _parts(body, _MOST_BACKUP)


def _parts(body: bytes, most: int) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            names = archive.namelist()
            if len(set(names)) != len(names) or sum(one.file_size for one in archive.infolist()) > most:
                raise ValueError
            return {name: archive.read(name) for name in names}
    except (ValueError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
        raise DeploymentError("this file is damaged, or not what it should be: ask for it again") from None
