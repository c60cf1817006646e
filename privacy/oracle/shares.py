"""The door of noise in shares: one clipped sum a round, which leaves it as integers with the site's noise in them."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import NoGuarantee
from ..events import Charge
from ..shared import RecordSum
from .door import ALL, NoisedDoor


class ShareDoor:
    """Answers one question a round, and never with a gradient.

    The noise of one site alone is too small to hide a record; only the sum over sites carries enough. So no method may
    see the answer: after a second step that depends on it, the other sites' noise would no longer be added, but would
    have passed through this site's gradients, and nothing is proved.

    Args:
        door: what draws and clips, over records or over patients drawn as units.
        shared: the run's constants.
        key: bytes[32], secret: the noise and the rounding of this one release.

    Guarantees:
        The answer is `RecordSum.encode` of Σ g · min(1, C/‖g‖) over one draw, and there is one. The secure sum of such
        answers is ``shared.event()``; `charges` names it. A single answer, seen by itself, has a share of noise only.
    """

    def __init__(self, door: NoisedDoor, shared: RecordSum, key: bytes) -> None:
        self._door, self._shared, self._key = door, shared, key
        self._answered = False

    def noised_sum(self, theta: Tensor) -> NDArray[np.int64]:
        """int64[dim]: the site's summand, from the clipped gradients at ``theta`` float32[1, P].

        Raises:
            NoGuarantee: a second question.
        """
        if self._answered:
            raise NoGuarantee("noise in shares covers one gradient query a round")
        self._answered = True
        return self._shared.encode(self._door._unnoised_sum(theta, self._door.draw(ALL)).numpy(), self._key)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What was executed, at its worst: with the fewest shares that a released sum may carry."""
        return (Charge(self._shared.event(), 1, self._door.whole),) if self._answered else ()
