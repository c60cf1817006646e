"""The shape of a federated method.

What may leave a site and what never does are different arguments and different results, so that private state can not
reach an update by mistake. Every tensor is [K, P]: K models at once, K = 1 at a real site.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol, runtime_checkable

from msgspec import Meta
from torch import Tensor

from privfed.privacy.adversaries import check_supported
from privfed.privacy.errors import NoGuarantee
from privfed.privacy.events import NoiseSite, PrivacyUnit
from privfed.privacy.oracle.door import ALL, Door

State = Mapping[str, Tensor]

Rate = Annotated[float, Meta(gt=0, le=1e4)]
Steps = Annotated[int, Meta(ge=1, le=100_000)]


@dataclass(frozen=True)
class Queries:
    """What one participation asks of the door: ``count`` fresh draws of ``part`` with one gradient each."""

    part: str
    count: int


class FederatedMethod(Protocol):
    """Init and apply, at the server and at a site."""

    sends: ClassVar[bool]
    """Whether anything leaves a site at all."""
    parts: ClassVar[Mapping[str, float]]
    """The fixed parts that a site's training records fall into, with their public fractions; "all" is implied."""

    def queries(self) -> tuple[Queries, ...]:
        """What one participation will ask of the door, known before any record is touched."""
        ...

    def guarantee(self, unit: PrivacyUnit, noise: NoiseSite) -> str | None:
        """None where the method is private under ``unit`` and ``noise``, else the reason why not."""
        ...

    def init_server(self, theta: Tensor) -> State:
        """The server's state; ``theta`` float32[P] is the start model."""
        ...

    def init_site(self, theta: Tensor) -> State:
        """A site's private state: it never leaves."""
        ...

    def contribute(self, broadcast: State, door: Door) -> Tensor:
        """float32[K, P]: the update, always a delta. All it knows of the records came through ``door``."""
        ...

    def personalize(self, broadcast: State, private: State, local_door: Door) -> State:
        """The site's next private state, whose "theta" is its personal model. The door may be exact: nothing leaves."""
        ...

    def serve(self, state: State, mean_update: Tensor, progress: float) -> State:
        """The server's next state from the sites' mean update float32[P]; ``progress`` in [0, 1) is the run's."""
        ...


@runtime_checkable
class SingleQuery(Protocol):
    """A method whose update is the door's one answer, unchanged: all that noise in shares covers."""

    def point(self, broadcast: State) -> Tensor:
        """float32[1, P]: where the gradient is asked; a function of what the server sent alone."""
        ...


def descend(theta: Tensor, door: Door, *, steps: int, lr: float, part: str = ALL) -> Tensor:
    """``steps`` of gradient descent from theta [K, P], each on a fresh draw."""
    for _ in range(steps):
        theta = theta - lr * door.gradient(theta, door.draw(part))
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


def one_answer(unit: PrivacyUnit, noise: NoiseSite) -> str | None:
    """The guarantee of a `SingleQuery`: what `post_processing` proves, and noise in shares."""
    if noise is NoiseSite.DISTRIBUTED and unit in (PrivacyUnit.RECORD, PrivacyUnit.PATIENT):
        return None
    return post_processing(unit, noise)


def fine_tuned(broadcast: State, local_door: Door, *, steps: int, lr: float) -> State:
    """A personal model: the server's, adapted on the site's own records alone."""
    return {"theta": descend(broadcast["theta"].unsqueeze(0), local_door, steps=steps, lr=lr)[0]}
