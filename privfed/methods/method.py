"""The shape of a federated method, and what most of them have in common.

What may leave a site and what never does are different arguments and different results, so that private state can not
reach an update by mistake. Every tensor is [K, P]: K models at once, K = 1 at a real site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

import msgspec
from msgspec import Meta
from torch import Tensor

from privfed.privacy.adversaries import check_supported
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door

from ..models import Layout, Part

State = Mapping[str, Tensor]

Rate = Annotated[float, Meta(gt=0, le=1e4)]
Steps = Annotated[int, Meta(ge=1, le=100_000)]


@dataclass(frozen=True)
class Queries:
    """What one participation asks of the door: ``count`` fresh draws of ``part``, with ``each`` gradients on a draw."""

    part: str
    count: int
    each: int = 1


class FederatedMethod(Protocol):
    """Init and apply, at the server and at a site.

    A site keeps two states. The *shared* one is made of public constants, of what the server sent, and of answers of
    the door that `contribute` was given: it may influence what leaves. The *private* one is made of anything: it is
    neither an argument nor a result of what leaves.
    """

    sends: ClassVar[bool]
    """Whether anything leaves a site at all."""
    parts: ClassVar[Mapping[str, float]]
    """The fixed parts that a site's training records fall into, with their public fractions; "all" is implied."""
    blocks: ClassVar[int]
    """How many vectors of the model's size an update is made of, one after the other."""
    stays: ClassVar[tuple[Part, ...]]
    """The parts of the model that never leave: whatever an update holds there is cut out of every block."""

    def queries(self) -> tuple[Queries, ...]:
        """What one participation will ask of the door, known before any record is touched."""
        ...

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        """None where the method is private under ``unit`` and ``noise``, else the reason why not."""
        ...

    def init_server(self, theta: Tensor) -> State:
        """The server's state; ``theta`` float32[P] is the start model."""
        ...

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        """A site's shared state and its private one."""
        ...

    def contribute(self, broadcast: State, shared: State, door: Door) -> tuple[Tensor, State]:
        """float32[K, blocks · P], the update, always a delta; and the next shared state, if it is released.

        All that either knows of the records came through ``door``.
        """
        ...

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        """The site's next private state, whose "theta" is its personal model. The door may be exact: nothing leaves."""
        ...

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        """The server's next state from the mean update float32[blocks · P], zero in what stays.

        ``progress`` in [0, 1) is the run's.
        """
        ...


@runtime_checkable
class SingleQuery(Protocol):
    """A method whose update is the door's one answer, unchanged: all that noise in shares covers."""

    def point(self, broadcast: State) -> Tensor:
        """float32[1, P]: where the gradient is asked; a function of what the server sent alone."""
        ...


class Averaging(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What most methods share: every site counts alike, w ← w + mean update, and nothing is kept between rounds."""

    sends: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, float]] = {}
    blocks: ClassVar[int] = 1
    stays: ClassVar[tuple[Part, ...]] = ()

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        return post_processing(unit, noise)

    def init_server(self, theta: Tensor) -> State:
        return {"theta": theta}

    def init_site(self, theta: Tensor, layout: Layout) -> tuple[State, State]:
        return {}, {}

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        return {"theta": state["theta"] + mean_update}


class FineTuned(Averaging, frozen=True, kw_only=True):
    """And a personal model that is fine-tuned at evaluation, from w unless the method has something better."""

    personal_steps: Annotated[Steps, Meta(description="adaptation steps at evaluation, never leaving the site")] = 20
    personal_lr: Annotated[Rate, Meta(description="learning rate of the adaptation")] = 0.2

    def personalize(self, broadcast: State, shared: State, private: State, local_door: Door) -> State:
        start = broadcast["theta"].unsqueeze(0)
        return {"theta": descend(start, local_door, steps=self.personal_steps, lr=self.personal_lr)[0]}


def descend(theta: Tensor, door: Door, *, steps: int, lr: float | Tensor, part: str = ALL) -> Tensor:
    """``steps`` of gradient descent from theta [K, P], each on a fresh draw; ``lr`` is one rate, or one a parameter."""
    for _ in range(steps):
        theta = theta - lr * door.gradient(theta, door.draw(part))
    return theta


def descend_near(theta: Tensor, centre: Tensor, door: Door, *, steps: int, lr: float, pull: float) -> Tensor:
    """The same on L(θ) + pull/2 ‖θ − centre‖². The pull is no gradient of records: it joins the noised answer."""
    for _ in range(steps):
        theta = theta - lr * (door.gradient(theta, door.draw()) + pull * (theta - centre))
    return theta


def post_processing(unit: PrivacyUnit, noise: NoiseSite) -> str | None:
    """The guarantee of a method that sends one vector, made of nothing but post-processed answers of its door.

    With noise added at the site, whatever is made of it costs nothing more. Where the whole vector is clipped and
    noised as one (client), what it was made of does not matter.
    """
    if unit is PrivacyUnit.NONE:
        return None
    try:
        check_supported(unit, noise)
    except NoGuarantee as refusal:
        return str(refusal)
    if unit is PrivacyUnit.CLIENT or noise is NoiseSite.LOCAL:
        return None
    return (
        f"privacy.noise = {noise.value!r} with privacy.unit = {unit.value!r} covers one gradient a round, and this "
        "method goes on from it at the site: use method.name = 'fedsgd', or privacy.noise = 'local'"
    )


def second_order(unit: PrivacyUnit, noise: NoiseSite) -> str | None:
    """The guarantee of a method that takes Hessian-vector products: none for units inside a site."""
    if unit in (PrivacyUnit.RECORD, PrivacyUnit.PATIENT):
        return (
            f"privacy.unit = {unit.value!r} with privacy.noise = {noise.value!r}: second-order terms read the support "
            "records once more without noise, as (I − αH) v, and no clip bounds what one record does to H v. Use "
            "method.name = 'fomaml' or 'per-fedavg', or method.first_order = true where the method has it, or "
            "privacy.unit = 'client'"
        )
    return post_processing(unit, noise)


def one_answer(unit: PrivacyUnit, noise: NoiseSite) -> str | None:
    """The guarantee of a `SingleQuery`: what `post_processing` proves, and noise in shares."""
    if noise is NoiseSite.DISTRIBUTED and unit in (PrivacyUnit.RECORD, PrivacyUnit.PATIENT):
        return None
    return post_processing(unit, noise)
