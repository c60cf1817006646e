"""Simulated outages: replies that never arrive."""

import random
from collections.abc import Mapping

from ..config import Simulation
from ..engines.contract import Engine
from ..wire import decode_request

STEPS = ("advertise", "share", "mask", "consistency", "unmask")
HOMOMORPHIC_STEPS = ("key", "commit", "close", "send", "deliver", "release")

# A site that vanishes by chance does so at one of STEPS, whatever the aggregation; what it then misses of another one.
_MISSED = {"submission": STEPS, "commit": STEPS[:2], "send": STEPS[:3]}


class FaultyEngine:
    """Loses replies on schedule and by chance; a site that vanishes in a round stays away until the next one.

    The site did its work and wrote its ledger; its answer is lost on the way. So an outage never makes ε smaller.

    Args:
        engine: what carries the messages.
        settings: chance of a site to vanish in a round, and outages on schedule.
        seed: public. Which site vanishes when depends on the seed, the round and the site alone.
    """

    def __init__(self, engine: Engine, settings: Simulation, *, seed: int) -> None:
        self._engine, self._settings, self._seed = engine, settings, seed

    def exchange(self, requests: Mapping[str, bytes], deadline_seconds: float) -> Mapping[str, bytes]:
        replies = self._engine.exchange(requests, deadline_seconds)
        if not self._settings.outages and self._settings.dropout == 0.0:
            return replies
        return {site: reply for site, reply in replies.items() if not self._lost(site, requests[site])}

    def _lost(self, site: str, request: bytes) -> bool:
        message = decode_request(request)
        for outage in self._settings.outages:
            if (outage.site, outage.round) == (site, message.round) and _reached(outage.step, message.step):
                return True
        chance = random.Random(f"{self._seed}/{message.round}/{site}")
        vanishes = chance.random() < self._settings.dropout
        return vanishes and _reached(chance.choice(STEPS), message.step)


def _reached(outage: str, step: str) -> bool:
    """Whether ``step`` comes at or after the outage's step, within a round's aggregation. Evaluation stands alone."""
    if outage in STEPS and step in _MISSED:
        return outage in _MISSED[step]
    for order in (STEPS, HOMOMORPHIC_STEPS):
        if outage in order and step in order:
            return order.index(step) >= order.index(outage)
    return outage == step
