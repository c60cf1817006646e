"""What a site gives to one round: an integer vector, and the charges that it must be booked under first."""

from dataclasses import dataclass, field

from privfed.crypto.packing import IntVector
from privfed.privacy import noise
from privfed.privacy.events import Charge, Gaussian, PrivacyUnit
from privfed.privacy.oracle.together import Oracle
from privfed.privacy.shared import ClientSum, RecordSum

from . import doors
from .architecture import Schema, sent
from .config import Config
from .doors import Network, Split
from .errors import PrivfedError
from .methods import SingleQuery, State
from .terms import Update, planned_charges


@dataclass(frozen=True)
class Contribution:
    """An update before it is given to the aggregation.

    Attributes:
        vector: int64[dim], as the aggregation adds it.
        charges: what was executed; for noise in shares at its worst, with the fewest shares in the sum.
        in_shares: the final charge depends on who contributes.
        shared: the site's next shared state.
    """

    vector: IntVector = field(repr=False)
    charges: tuple[Charge, ...]
    in_shares: bool
    shared: State = field(default_factory=dict, repr=False)


def contribute(
    config: Config,
    schema: Schema,
    records: Split,
    state: State,
    shared: State,
    encoding: Update,
    *,
    noise_multiplier: float,
    key: bytes,
    network: Network | None = None,
    oracle: Oracle | None = None,
) -> Contribution:
    """The site's part in the round's sum.

    Args:
        records: behind the doors.
        state: what the server sent.
        shared: the site's shared state, from `FederatedMethod.init_site` or an earlier contribution.
        encoding: how the update becomes integers.
        key: bytes[32], secret, for this release alone: every random number derives from it, so that the same release
            can be made again after a crash.
        network: as of `doors.private_door`; of no account where the claim is about the whole update, or none is made.
        oracle: computes gradients for simulated sites together; None at a real site.

    Raises:
        PrivfedError: the method executed something else than it declared; nothing may be released.
    """
    method = config.method
    leaves = sent(config, schema.features, len(state["theta"]))
    if isinstance(encoding, RecordSum):
        if not isinstance(method, SingleQuery):
            raise PrivfedError(f"method {type(method).__name__} asks for more than one gradient: not released")
        shares = doors.share_door(
            config,
            schema,
            records,
            encoding,
            noise_multiplier=noise_multiplier,
            key=key,
            network=network,
            oracle=oracle,
        )
        return Contribution(shares.noised_sum(method.point(state)), shares.charges, in_shares=True)
    if isinstance(encoding, ClientSum):
        exact = doors.exact_door(config, schema, records, noise.derive_key(key, b"draw"), oracle=oracle)
        sourced = doors.with_source(config, schema, exact, key, oracle=oracle)
        update, after = method.contribute(state, shared, sourced)
        vector = encoding.encode(update[0, leaves].numpy(), noise.derive_key(key, b"release"))
        return Contribution(vector, (Charge(encoding.event()),), in_shares=not encoding.at_server, shared=after)
    if config.privacy.unit is PrivacyUnit.NONE:
        exact = doors.exact_door(config, schema, records, key, oracle=oracle)
        sourced = doors.with_source(config, schema, exact, key, oracle=oracle)
        update, after = method.contribute(state, shared, sourced)
        # An update without noise is booked as what it is: ε of these records is infinite from now on.
        free = (Charge(Gaussian(noise_multiplier=0.0)),)
        return Contribution(encoding.grid.encode(update[0, leaves].numpy()), free, in_shares=False, shared=after)
    private = doors.private_door(
        config, schema, records, noise_multiplier=noise_multiplier, key=key, network=network, oracle=oracle
    )
    sourced = doors.with_source(config, schema, private, key, oracle=oracle)
    update, after = method.contribute(state, shared, sourced)
    planned = planned_charges(config, encoding, noise_multiplier)
    if sorted(private.charges, key=repr) != sorted(planned, key=repr):
        raise PrivfedError(
            f"method {type(method).__name__} executed {private.charges}, declared {planned}: not released"
        )
    vector = encoding.grid.encode(update[0, leaves].numpy())
    return Contribution(vector, private.charges, in_shares=False, shared=after)
