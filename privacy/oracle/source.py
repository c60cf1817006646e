"""A door beside which public records stand."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..errors import NoGuarantee
from ..events import Charge
from .door import ALL, Batch, Door


@runtime_checkable
class WithSource(Door, Protocol):
    """A door that also answers about a public source."""

    def source_gradient(self, theta: Tensor) -> Tensor:
        """float32[K, P]: the mean loss gradient over a public draw of the source's records."""
        ...


class SourcedDoor:
    """``door`` for the site's records, ``source`` for the public ones.

    Guarantees:
        What ``door`` clips, noises and books is what it would without a source. ``source`` knows no record of the
        site: its answers are constants here, and cost nothing. That its records are public rests on whoever named
        them so.
    """

    def __init__(self, door: Door, source: Door) -> None:
        self._door, self._source = door, source

    def draw(self, part: str = ALL) -> Batch:
        return self._door.draw(part)

    def gradient(self, theta: Tensor, batch: Batch) -> Tensor:
        return self._door.gradient(theta, batch)

    @property
    def charges(self) -> tuple[Charge, ...]:
        return self._door.charges

    def source_gradient(self, theta: Tensor) -> Tensor:
        return self._source.gradient(theta, self._source.draw())


def source_gradient(door: Door, theta: Tensor) -> Tensor:
    """`WithSource.source_gradient`, where there is a source.

    Raises:
        NoGuarantee: there is none.
    """
    if not isinstance(door, WithSource):
        raise NoGuarantee("the method weighs a public source, and there is none: set transfer.public_source")
    return door.source_gradient(theta)
