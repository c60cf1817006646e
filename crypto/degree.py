"""How many neighbours are enough: degree and threshold of the k-regular graph (Bell et al. 2020, §3.3 and §4).

With clients placed at random, three things may go wrong, each with a chance that is bounded here:

- *disconnected*: removing the corrupt and the dropped leaves the honest survivors in two parts, whose sums then show
  apart. On a ring that takes k/2 bad clients in a row at two places.
- *captured*: some client has t or more corrupt neighbours, who rebuild both of its secrets.
- *starved*: some client has fewer than t surviving neighbours, and the sum cannot be unmasked.

The first two together stay below 2^−40, the third below 2^−20. Chances of neighbours are hypergeometric tails, in exact
integers. Google's finder (google-parfait/federated-compute, fcp/secagg/server/graph_parameter_finder.cc) computes the
same in floating point; its answers are this file's tests.
"""

import math
from functools import lru_cache
from typing import Literal

SECURITY_BITS = 40
CORRECTNESS_BITS = 20

Rule = Literal["semi-honest", "semi-malicious"]
"""semi-malicious: 2t > k + the corrupt neighbours of any client, so that a server which shows the neighbours of one
client different survivors never collects t shares of both kinds. semi-honest: only that fewer than t are corrupt."""


@lru_cache(maxsize=64)
def degree_and_threshold(
    n: int, *, corrupt: float = 0.1, dropout: float = 0.1, rule: Rule = "semi-malicious"
) -> tuple[int, int]:
    """The smallest degree k, and the threshold t for it.

    Args:
        n: clients.
        corrupt: fraction of clients that collude with the server, in [0, 1).
        dropout: fraction that may drop out, in [0, 1).
        rule: what the server may try.

    Returns:
        (k, t): each client masks with k others, even; t shares rebuild a secret.

    Raises:
        ValueError: rates out of range, or no degree below n − 1 is safe; the complete graph is the remedy.
    """
    for name, rate in (("corrupt", corrupt), ("dropout", dropout)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate}")
    # Without the 1e-14, 0.3 × 10 would round to 2 corrupt clients.
    bad, gone = math.floor((corrupt + 1e-14) * n), math.floor((dropout + 1e-14) * n)
    alive = math.ceil((1 - dropout - 1e-14) * n)
    for k in range(2, n - 1, 2):
        if _log2_disconnected(n, k, bad + gone) >= -(SECURITY_BITS + 1):
            continue
        most = _most_captured(n, k, bad)
        # The integer form of Google's ⌈(t₁ + k − 1.25) / 2⌉.
        most = (most + k) // 2 if rule == "semi-malicious" else most
        if most < _fewest_alive(n, k, alive):
            return k, max(most + 1, 2)
    raise ValueError(
        f"no degree below {n - 1} is safe for {n} clients with {corrupt:g} corrupt and {dropout:g} dropping out; "
        "use the complete graph"
    )


@lru_cache(maxsize=64)
def check(n: int, *, degree: int, threshold: int, colluders: int, minimum_cohort: int) -> None:
    """Returns only if a session on the k-regular graph keeps its clients' inputs apart.

    Args:
        n: clients invited.
        degree: k, other clients each masks with.
        threshold: t.
        colluders: clients that may collude with the server.
        minimum_cohort: survivors without whom nothing is released, so that at most n − minimum_cohort drop out.

    Raises:
        ValueError: with what is needed.

    **Guarantees**: over the placement of clients, the chance that some honest client's neighbours hold t corrupt, or
    that the honest survivors fall apart, is below 2^−40, for every number of members from minimum_cohort to n.
    """
    if degree % 2 or not 2 <= degree < n - 1:
        raise ValueError(f"degree must be even and in [2, {n - 2}] for {n} clients, got {degree}; or None for all")
    if not degree + 1 < 2 * threshold <= 2 * degree:
        raise ValueError(f"threshold must be in ({(degree + 1) / 2:g}, {degree}] for degree {degree}, got {threshold}")
    if not colluders < minimum_cohort - 1:
        raise ValueError(f"colluders must be below minimum_cohort − 1 = {minimum_cohort - 1}, got {colluders}")
    # Fewer members make colluders denser, more members leave more dropouts: each bound at its worst end.
    if _most_captured(minimum_cohort, min(degree, minimum_cohort), colluders) >= threshold:
        raise ValueError(
            f"threshold {threshold} is too small for degree {degree} and {colluders} colluders among {minimum_cohort}: "
            f"some client may have {threshold} colluding neighbours; raise degree and threshold"
        )
    if _log2_disconnected(n, degree, colluders + n - minimum_cohort) >= -(SECURITY_BITS + 1):
        raise ValueError(
            f"degree {degree} is too small for {n} clients with {colluders} colluders and {n - minimum_cohort} "
            "dropouts: the survivors may fall apart; raise degree or minimum_cohort"
        )


def _log2_disconnected(n: int, k: int, bad: int) -> float:
    """log₂ of a bound on the chance that `bad` of n clients on the ring cut it: k/2 in a row at two places."""
    if k > bad:
        return -math.inf
    places = n * (n - k - 1)  # counts every pair of places twice
    return math.log2(places) - 1 + _log2(math.comb(n - k, bad - k)) - _log2(math.comb(n, bad))


def _log2(number: int) -> float:
    """log₂ of an integer beyond floating point."""
    shift = max(0, number.bit_length() - 900)
    return math.log2(number >> shift) + shift


def _most_captured(n: int, k: int, bad: int) -> int:
    """The smallest m with P[more than m of k neighbours are bad] < 2^−41 / n: a union bound over clients."""
    ways, limit, m = 0, math.comb(n, k), k
    while m >= 0:
        ways += math.comb(bad, m) * math.comb(n - bad, k - m)
        if (ways << (SECURITY_BITS + 1)) * n >= limit:
            break
        m -= 1
    return m


def _fewest_alive(n: int, k: int, alive: int) -> int:
    """The largest m with P[fewer than m of k neighbours survive] < 2^−20 / n."""
    ways, limit, m = 0, math.comb(n, k), 0
    while m <= k:
        ways += math.comb(alive, m) * math.comb(n - alive, k - m)
        if (ways << CORRECTNESS_BITS) * n >= limit:
            break
        m += 1
    return m
