"""The table of promises: who sees what in a run, and what differential privacy promises against each.

It follows SECURITY.md and the adversaries of privacy.md section 4. A combination that is not in them gets no promise:
the page then says so.
"""

from dataclasses import dataclass

from privfed.privacy.adversaries import Adversary as Seen
from privfed.privacy.events import NoiseSite, PrivacyUnit

from .history import History
from .words import UNITS, epsilon_text, in_shares, is_central


@dataclass(frozen=True)
class Adversary:
    """One line of the table of promises."""

    who: str
    sees: str
    promise: str


def adversaries(history: History) -> list[Adversary]:
    """Who sees what in a run like this one, and what differential privacy promises against them."""
    summary = history.summary
    if not history.config.method.sends:
        return [
            Adversary("The server", "No update. Accuracy figures, which are exact", "No update leaves a site"),
            Adversary("Another site", "Nothing", "Nothing reaches it"),
            Adversary("Whoever gets a site's own model", "That model", "No claim: it is trained without noise"),
        ]
    match summary.aggregation.kind:
        case "masked":
            rows = _masked(history)
        case "homomorphic":
            rows = _homomorphic(history)
        case "plain":
            seen, promise = "Every site's update, every round", _promise(history, Seen.SERVER)
            rows = [
                Adversary("A curious server", seen, promise),
                Adversary("A malicious server, which breaks the protocol", seen, promise),
            ]
        case other:
            rows = [Adversary("The server", f"What {other} aggregation shows it", _promise(history, Seen.SERVER))]
    return rows + _others(history)


def _masked(history: History) -> list[Adversary]:
    cohorts = history.cohorts
    # Sites that leave for good make the cohort smaller: the promise is that of the smallest one.
    fewest = min((cohort.size - cohort.tolerated_dropouts for cohort in cohorts), default=None)
    total = f"Each round, the sum of {_at_least(fewest, history)} sites' updates; no single one"
    rows = [Adversary("A curious server", total, _promise(history, Seen.SERVER)), *_coalitions(history)]
    if not cohorts:
        return rows
    threshold = min(cohort.threshold for cohort in cohorts)
    colluders = min(cohort.colluders for cohort in cohorts)
    if history.summary.privacy.colluders is not None:
        colluders = min(colluders, history.summary.privacy.colluders)
    opened = "under its own share of the noise" if in_shares(history) else "its mask no longer hides"
    return [
        *rows,
        Adversary(
            f"The server and {threshold} or more holders of a site's shares",
            f"That site's update: {opened}",
            _opened(history),
        ),
        Adversary(
            "A malicious server, which breaks the protocol",
            f"The sum only, while no more than {colluders} of the sites collude with it",
            _with_colluders(history),
        ),
    ]


def _homomorphic(history: History) -> list[Adversary]:
    holder = history.config.aggregation.key_holder
    fewest = min((cohort.minimum_cohort for cohort in history.cohorts), default=None)
    total = f"Each round, the sum of {_at_least(fewest, history)} sites' updates"
    less = f"; {holder} is a site: less its own" if holder else ""
    own = ", under its own share of the noise" if in_shares(history) else ""
    central = history.summary.privacy.noise == NoiseSite.CENTRAL.value
    return [
        Adversary("A curious server", f"{total}; no single one", _promise(history, Seen.SERVER)),
        Adversary(
            "The key holder",
            f"{total}{less}; no single one",
            # With central noise it sees the sum as the server does, before the noise
            _promise(history, Seen.OTHER_SITE if holder and not central else Seen.SERVER),
        ),
        *_coalitions(history),
        Adversary("The server and the key holder together", f"Every site's update{own}, every round", _opened(history)),
        Adversary(
            "A malicious server, which breaks the protocol",
            "The sum only, unless the key holder helps it",
            _with_colluders(history),
        ),
    ]


def _coalitions(history: History) -> list[Adversary]:
    """The server with one site, and with as many as the noise was sized for."""
    colluders = history.summary.privacy.colluders
    # One site that helps the server adds its own share of the noise to what the server knows, and nothing else
    one = Seen.SERVER if colluders is None else Seen.OTHER_SITE
    if history.summary.privacy.noise == NoiseSite.CENTRAL.value:
        one = Seen.SERVER
    rows = [Adversary("The server and one site", "The sum without that site's own update", _promise(history, one))]
    if colluders is not None and colluders > 1:
        seen = "The sum without those sites' own updates, and those sites' shares of the noise"
        rows.append(Adversary(f"The server and {colluders} sites", seen, _with_colluders(history)))
    return rows


def _others(history: History) -> list[Adversary]:
    """Those who do not run the server."""
    unit = UNITS.get(history.summary.privacy.unit, "record")
    shares = in_shares(history)
    model, another = _promise(history, Seen.MODEL_USER), _promise(history, Seen.OTHER_SITE)
    together = "This site's update: the change of the model less their own"
    if history.summary.privacy.noise == NoiseSite.CENTRAL.value:
        together += ", under the server's noise"
    elif shares:
        together += ", under this site's own share of the noise"
    poison = "As any site; it can also poison the model or abort rounds"
    if shares:
        poison += ", or leave its share of the noise out: then it counts as one that colludes"
    return [
        Adversary("Another site", "The global model after each round", another),
        Adversary("All other sites together", together, _all_others(history)),
        Adversary("Whoever gets the global model", "The final model", model),
        Adversary(
            "A malicious site", poison, f"For others' {unit}s: {another}" if another.startswith("ε") else another
        ),
    ]


def _at_least(fewest: int | None, history: History) -> str:
    return f"at least {fewest} of {history.summary.sites}" if fewest is not None else "the"


def _promise(history: History, who: Seen, colluders: int = 0) -> str:
    """The bound against one adversary, and what it rests on."""
    privacy = history.summary.privacy
    if privacy.unit == PrivacyUnit.NONE.value or privacy.epsilon.max is None:
        return "No claim"
    if privacy.insecure_seed:
        return "Void: the seed of the noise is known"
    unit = UNITS[privacy.unit]
    if privacy.noise == NoiseSite.LOCAL.value and privacy.colluders is None:
        return f"ε ≤ {epsilon_text(privacy.epsilon.max)} for each {unit}, by its own site's noise"
    for line in privacy.adversaries:
        if (line.adversary, line.colluders) == (who.value, colluders):
            if line.epsilon is None:
                return f"No bound: {line.reason}"
            return f"ε ≤ {epsilon_text(line.epsilon)} for each {unit}, by {line.reason}"
    return f"Not stated on this page for {privacy.unit} unit with {privacy.noise} noise"


def _with_colluders(history: History) -> str:
    """Against the server with as many sites as the noise was sized for."""
    colluders = history.summary.privacy.colluders
    if not colluders or is_central(history):
        return _promise(history, Seen.SERVER)
    return _promise(history, Seen.COALITION, colluders)


def _opened(history: History) -> str:
    """Against those who have a single site's vector before them."""
    if is_central(history) or history.summary.privacy.colluders is None:
        return _promise(history, Seen.SERVER)
    most = [line.colluders for line in history.summary.privacy.adversaries if line.adversary == Seen.COALITION.value]
    return _promise(history, Seen.COALITION, max(most, default=0))


def _all_others(history: History) -> str:
    if not is_central(history):
        return _opened(history)
    if history.summary.privacy.colluders is not None:  # of what is released beside the updates they know all but one
        return "Not stated on this page: of the released figures' noise, one share alone would be left"
    return _promise(history, Seen.OTHER_SITE)
