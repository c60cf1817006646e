"""Who is at fault when an aggregation stops: our caller, a peer, or nobody."""

from collections.abc import Mapping


class AggregationError(Exception):
    """Base of everything an aggregation raises on purpose. No message ever carries a secret, a share or an input."""


class LocalProtocolError(AggregationError):
    """Our own caller misused a machine: started it twice, fed a failed one, read a result before the end.

    Going on would reuse keys or masks, and a mask used twice reveals the difference of two inputs."""


class RemoteProtocolError(AggregationError):
    """A peer sent what the protocol forbids. A server's state is unchanged: one bad client never ends a round.

    All failures to open, verify or decode look alike, so that a peer learns nothing by probing."""


class ReplayRefused(RemoteProtocolError):
    """The journal has already answered this round, or answered this step otherwise.

    Answering again would let a server subtract two answers that differ in one client or in one mask."""


class ThresholdNotMet(AggregationError):
    """Nobody's fault: too few clients are left. No partial sum is released; retry as a new attempt with fresh keys.

    Attributes:
        stage: the phase that ended short.
        needed: clients needed to go on.
        have: clients that answered.
    """

    def __init__(self, *, stage: str, needed: int, have: int) -> None:
        super().__init__(
            f"{stage}: {have} clients answered, {needed} are needed; start a new attempt with the clients that are up"
        )
        self.stage, self.needed, self.have = stage, needed, have


class FaultyDealer(AggregationError):
    """A client dealt shares that do not open, or that do not rebuild the secret it committed to: the attempt is void.

    Attributes:
        stage: the phase that found out.
        accusers: dealer → the clients that complained; an empty tuple where the server itself proved the fault by the
            dealer's own signed commitments. A complaint is a claim: with at most c colluders, more than c accusers
            prove it; below that either side may be lying, and revealing keys to decide would expose other inputs.
    """

    def __init__(self, *, stage: str, accusers: Mapping[int, tuple[int, ...]]) -> None:
        named = ", ".join(
            f"client {dealer} (proved)" if not by else f"client {dealer} (by {', '.join(map(str, by))})"
            for dealer, by in sorted(accusers.items())
        )
        super().__init__(f"{stage}: faulty shares dealt by {named}; start a new attempt without the faulty dealer")
        self.stage, self.accusers = stage, dict(accusers)


class KeyHolderSilent(AggregationError):
    """The key holder did not answer, or refused: without it nothing can be decrypted. Retry as a new attempt.

    Attributes:
        stage: the phase that ended without its answer.
    """

    def __init__(self, *, stage: str) -> None:
        super().__init__(f"{stage}: no valid answer from the key holder; see that it is up and start a new attempt")
        self.stage = stage


class SumOutOfRange(AggregationError):
    """The sum exceeds contributors × bound: a client sent a value no honest client has. Nothing is released."""
