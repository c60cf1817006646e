"""The key holder of homomorphic aggregation: a party of its own, or one of the sites in a second role."""

import logging

from privfed.crypto.errors import AggregationError
from privfed.crypto.homomorphic.key_holder import HomomorphicKeyHolder
from privfed.crypto.homomorphic.messages import KEY_HOLDER_STEPS
from privfed.crypto.journal import Journal
from privfed.crypto.roster import Identity, Roster

from . import parameters, wire
from .config import Policy
from .errors import PrivfedError
from .policy import PolicyRefusal, check_names
from .site import Site
from .terms import key_holder_of, plan_encoding, session_of, side_encoding

logger = logging.getLogger(__name__)


class KeyHolder:
    """A key holder's side of every round. It has no records and no ledger.

    Args:
        identity: its private keys; their public side stands in ``roster``.
        roster: the roster it has accepted.
        journal: its own durable memory, not one that a site's client uses.
        policy: its ``minimum_cohort`` and ``max_parameters``, and the names that it accepts, its own in ``key_holders``
            among them, are what this party demands, whatever a plan says.

    Guarantees:
        Those of `HomomorphicKeyHolder`, for the plan and model that it received itself. One key at a time: a round that
        begins, or begins anew, destroys the one before. The key of a round that its coordinator gave up lives until
        then, in memory.
    """

    def __init__(self, *, identity: Identity, roster: Roster, journal: Journal, policy: Policy) -> None:
        self.name = identity.name
        self._identity, self._roster, self._journal, self._policy = identity, roster, journal, policy
        self._index = roster.index_of(identity.member.secagg_key)
        self._round: int | None = None
        self._machine: HomomorphicKeyHolder | None = None

    def handle(self, request: bytes) -> bytes:
        """The answer to one request. Never raises for what a peer sent: a refusal is an answer with its reason."""
        try:
            match wire.decode_request(request):
                case wire.Begin() as begin:
                    reply: wire.Reply = wire.Answer(self._begin(begin))
                case wire.Step() as step:
                    reply = wire.Answer(self._step(step))
                case wire.Evaluate():
                    raise wire.WireError("a key holder has nothing to evaluate")
        except PolicyRefusal as error:
            reply = wire.Refusal("policy", str(error), final=True)
        except (AggregationError, wire.WireError) as error:
            reply = wire.Refusal("protocol", str(error), final=False)
        except (PrivfedError, ValueError) as error:
            reply = wire.Refusal("error", str(error), final=False)
        except Exception as error:
            # As at a site: whatever a peer's bytes set off, it answers and goes on
            logger.error("%s: unexpected %s", self.name, type(error).__name__)
            reply = wire.Refusal("error", f"unexpected {type(error).__name__} at the key holder", final=False)
        if isinstance(reply, wire.Refusal):
            logger.info("%s refuses: %s", self.name, reply.reason)
        return wire.encode(reply)

    def _begin(self, message: wire.Begin) -> bytes:
        plan = wire.decode_plan(message.plan)
        if plan.roster_version != self._roster.version:
            raise PolicyRefusal(
                f"the plan is for roster version {plan.roster_version}, {self.name} has accepted {self._roster.version}"
            )
        if not plan.key_holder == self._index == key_holder_of(plan.config, self._roster):
            raise wire.WireError(f"{self.name} is not the key holder of this plan")
        check_names(plan.config, self._policy)
        if plan.minimum_cohort < self._policy.minimum_cohort:
            raise PolicyRefusal(
                f"policy.minimum_cohort = {self._policy.minimum_cohort}, the plan would release a sum of "
                f"{plan.minimum_cohort}"
            )
        theta = parameters.decode(message.state).get("theta")
        if theta is None or theta.ndim != 1:
            raise wire.WireError("the model must be one vector of parameters")
        if len(theta) > self._policy.max_parameters:
            raise PolicyRefusal(
                f"policy.max_parameters = {self._policy.max_parameters}, the plan's model has {len(theta)}"
            )
        purpose = message.purpose
        encoding = plan_encoding(plan, len(theta)) if purpose == "update" else side_encoding(plan, purpose)
        session = session_of(plan, wire.context(message.plan, message.state), encoding, purpose)
        if self._machine is not None:
            self._machine.close()
        self._machine = HomomorphicKeyHolder(
            session=session, identity=self._identity, roster=self._roster, journal=self._journal
        )
        self._round = plan.round
        return self._machine.receive(message.opening)

    def _step(self, message: wire.Step) -> bytes:
        if self._machine is None or self._round != message.round:
            raise wire.WireError(f"{self.name} holds no key for round {message.round}")
        return self._machine.receive(message.payload)


class SiteWithKey:
    """A site that is the key holder too: each request goes to the role that its step belongs to."""

    def __init__(self, site: Site, key_holder: KeyHolder) -> None:
        self._site, self._key_holder = site, key_holder

    def handle(self, request: bytes) -> bytes:
        try:
            role = self._key_holder if wire.decode_request(request).step in KEY_HOLDER_STEPS else self._site
        except wire.WireError:
            role = self._site
        return role.handle(request)
