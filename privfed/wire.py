"""What a coordinator and a site say to each other: typed, versioned bytes that any engine can carry."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Annotated, Literal, TypeVar, get_args

import msgspec
from msgspec import Meta

from privfed.privacy.clipping import LARGEST, SMALLEST

from . import __version__
from .config import Config, SideNoise
from .errors import PrivfedError

PROTOCOL: Literal["privfed/1"] = "privfed/1"
MAX_MESSAGE_BYTES = 1 << 30


class WireError(PrivfedError):
    """Bytes that are not a message of this protocol. Nothing was done."""


class RoundPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, eq=False):
    """Everything that one attempt at one round is bound to. Its exact bytes are part of the aggregation's session id.

    Args:
        config: the whole configuration of the run.
        noise_multiplier: σ/C of this run; 0 for a run without a claim.
        cohort: roster indices of the invited sites, increasing.
        degree: neighbours of each site in the mask graph; None for all.
        key_holder: roster index of the party that decrypts in homomorphic aggregation.
        clip: C of this round, where it adapts; None where the configuration fixes it.
        features: the model's inputs.
        side_noise: σ/C of what is released beside the updates.

    Its exact bytes tell one from another. As an object it equals itself alone, so that what follows from it can be kept
    without going through the cohort.
    """

    run: Annotated[str, Meta(min_length=1, max_length=200)]
    round: Annotated[int, Meta(ge=0)]
    attempt: Annotated[int, Meta(ge=0)]
    cohort: tuple[int, ...]
    threshold: Annotated[int, Meta(ge=1)]
    minimum_cohort: Annotated[int, Meta(ge=1)]
    colluders: Annotated[int, Meta(ge=0)]
    degree: Annotated[int, Meta(ge=2)] | None
    noise_multiplier: Annotated[float, Meta(ge=0)]
    clip: Annotated[float, Meta(ge=SMALLEST, le=LARGEST)] | None = None
    config: Config
    features: Annotated[int, Meta(ge=1)] = 1
    side_noise: SideNoise = SideNoise()
    roster_version: int
    key_holder: int | None = None
    protocol: Literal["privfed/1"] = PROTOCOL
    code_version: str = __version__


Purpose = Literal["update", "figures", "inputs"]
"""What is added up: updates, counts of how good the model is, or moments of the inputs."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """The plan, the server's state, and the first message of an aggregation of the round."""

    round: int
    step: str
    plan: bytes
    state: bytes
    opening: bytes
    purpose: Purpose = "update"


class Step(msgspec.Struct, frozen=True, tag="step"):
    """A further message of the aggregation."""

    round: int
    step: str
    payload: bytes


class Evaluate(msgspec.Struct, frozen=True, tag="evaluate"):
    """The new state, to be measured. It says that the round is over."""

    round: int
    step: str
    plan: bytes
    state: bytes


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """The aggregation's answer."""

    payload: bytes


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """A site will not, and says why. ``final`` means for the rest of the run."""

    kind: Literal["policy", "budget", "protocol", "error"]
    reason: str
    final: bool


class Measurement(msgspec.Struct, frozen=True, tag="measurement"):
    """A site's figures on its own test records: internal, not differentially private.

    Args:
        records: test records.
        loss: mean loss of the global model.
        global_score, personalized, local_only: the configured metric; None where it is undefined.
        epsilon: what the site's ledger says it has spent, all runs together; None without a claim.
        seal: the site's signed word on its ledger and that ε; see seals.py.
    """

    records: int
    loss: float | None
    global_score: float | None
    personalized: float | None
    local_only: float | None
    epsilon: float | None
    seal: bytes = b""


Request = Begin | Step | Evaluate
Reply = Answer | Refusal | Measurement

_T = TypeVar("_T")
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_plans = msgspec.msgpack.Decoder(RoundPlan)


def encode(message: Request | Reply) -> bytes:
    return msgspec.msgpack.encode(message)


class Requests(Mapping[str, bytes]):
    """Messages by receiver, each encoded when it is taken: a round's plan and model are not held once for every site.

    Args:
        messages: by name.
    """

    def __init__(self, messages: Mapping[str, Request]) -> None:
        self._messages = messages

    def __getitem__(self, name: str) -> bytes:
        return encode(self._messages[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._messages)

    def __len__(self) -> int:
        return len(self._messages)


def printable(text: str) -> str:
    """What a peer wrote, on one line and without what moves a terminal's cursor or hides what stands on it."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def encode_plan(plan: RoundPlan) -> bytes:
    return msgspec.msgpack.encode(plan)


def decode_request(data: bytes) -> Request:
    return _decoded(_requests, data)


def decode_reply(data: bytes) -> Reply:
    reply = _decoded(_replies, data)
    if isinstance(reply, Refusal):  # it goes to logs, reports and terminals
        return msgspec.structs.replace(reply, reason=printable(reply.reason))
    return reply


@lru_cache(maxsize=4)  # all sites of a simulation get the same; it is frozen
def decode_plan(data: bytes) -> RoundPlan:
    """The plan in ``data``; a plan of another version of the protocol or the code is refused."""
    plan = _decoded(_plans, data)
    if plan.code_version != __version__:
        raise WireError(f"the plan is of privfed {plan.code_version}, this site runs {__version__}: use one version")
    return plan


def context(plan: bytes, state: bytes) -> bytes:
    """bytes[32]: what a party received. Parties that received different plans or models can not aggregate together."""
    return hashlib.sha256(_plan_digest(plan) + hashlib.sha256(state).digest()).digest()


@lru_cache(maxsize=4)
def _plan_digest(plan: bytes) -> bytes:
    return hashlib.sha256(plan).digest()


def _decoded(decoder: "msgspec.msgpack.Decoder[_T]", data: bytes) -> _T:
    if len(data) > MAX_MESSAGE_BYTES:
        raise WireError(f"a message of {len(data)} bytes is above the limit of {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise WireError(f"not a message of {PROTOCOL}: {type(error).__name__}") from None
