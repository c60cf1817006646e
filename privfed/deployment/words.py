"""What a site agreed to, in plain words: for the person who starts it, not for the one who wrote it."""

from privfed.config import Policy
from privfed.wire import printable

from . import papers
from .papers import Terms


def agreement(terms: Terms, policy: Policy, *, name: str, data: str) -> str:
    """What ``privfed site init`` prints."""
    columns = ", ".join(column.name for column in terms.data.columns)
    spend = "the run's own target" if policy.max_epsilon is None else f"ε = {policy.max_epsilon:g}"
    flower = terms.engine == "flower"
    proof = "to a Flower node with a key of its own" if flower else "with a certificate of this site's own on both ends"
    lines = [
        f"{name} takes part in the consortium {terms.name!r} ({terms.contact}).",
        "",
        "What leaves this machine, to one address only:",
        f"  {terms.host}, port {terms.port}, over TLS, {proof}.",
        "  In training: an update, clipped and noised, and hidden in a sum with the other sites' updates."
        if policy.require_secure_aggregation
        else "  In training: an update, clipped and noised. WITHOUT secure aggregation if a run asks for that.",
        "  Beside it: that this site is there, what it refuses and why, its signed word on the ε that it has spent."
        + (" Accuracy and loss on its own test records, exactly." if policy.release_figures else ""),
        "  Never: a record, a key, a personal model, a log.",
        "",
        "What is read here:",
        f"  {data}",
        f"  its columns {columns}; and {terms.data.label!r}, which is predicted.",
        "",
        "What no coordinator and no job can change (policy.toml, this site's own):",
        f"  at most {spend} is ever spent on these records, at δ = {policy.delta:g}, all runs together;",
        f"  no sum of fewer than {policy.minimum_cohort} sites;",
        "  no run without a differential-privacy claim;"
        if policy.require_privacy
        else "  runs WITHOUT a differential-privacy claim are allowed;",
        "  no noise that only the server adds;" if policy.refuse_central_noise else "  the server may add the noise;",
        *_narrower(policy),
        *_code(terms),
        "",
        f"The authority that signs the list of sites: {papers.fingerprint(bytes.fromhex(terms.authority))}",
        "What was asked, refused and spent: privfed site status. To stop: end the process; to leave: tell the contact.",
    ]
    return "\n".join(map(printable, lines))  # the coordinator wrote names and the contact: not a line of ours


def _code(terms: Terms) -> list[str]:
    """Whose code runs on a site's machine."""
    if terms.engine == "flower":
        return [
            "WHAT THE CONSORTIUM CAN CHANGE: which code Flower runs on this machine; a run brings its own. It can read",
            "  what its SuperNode's user can read: have that be another user than this site's (privfed site serve).",
        ]
    return ["  no code from elsewhere: jobs name one class of the toolkit that is installed here, and nothing else."]


def _narrower(policy: Policy) -> list[str]:
    """The lines of a policy that most sites leave away."""
    lines = []
    if policy.max_epsilon_per_run is not None:
        lines.append(f"  at most ε = {policy.max_epsilon_per_run:g} of it in one run;")
    if policy.minimum_noise_multiplier is not None:
        lines.append(f"  no noise below {policy.minimum_noise_multiplier:g} times the clip;")
    for kind, names in (
        ("method", policy.methods),
        ("model", policy.models),
        ("privacy unit", policy.units),
        ("aggregation", policy.aggregations),
        ("key holder", policy.key_holders),
    ):
        if names is not None:
            lines.append(f"  no other {kind} than {', '.join(names) or 'none at all'};")
    if policy.hours is not None:
        lines.append(f"  no round that begins outside {policy.hours}, this machine's own time;")
    return lines
