"""Skellam noise of a large variance is rounded Gaussian noise in all but name, and costs what Gaussian noise costs.

Let S ~ Skellam(μ), and R = ⌊N(0, μ − 1/12)⌉, which has the same variance. A sum of integers plus R is the rounded sum
of the integers and Gaussian noise: post-processing of the Gaussian mechanism. So a release with S costs what the
Gaussian mechanism of standard deviation √(μ − 1/12) costs, and what telling S from R is worth.

**Lemma.** KL(S ‖ R) ≤ 1/(40 μ²) for μ ≥ 4000. (It tends to 1/(48 μ²); Edgeworth: the fourth cumulants differ by μ.)

*log P(S = k), from above.* Let w = √(μ² + k²) and τ = asinh(k/μ). With the path of the Bessel integral at θ − iτ,

    P(S = k) = e^(w − μ − kτ) · (1/π) ∫₀^π e^(−w(1 − cos θ)) cos(k(θ − sin θ)) dθ.

With cos y ≤ 1 − y²/2 + y⁴/24 this is at most A − k²B/2 + k⁴C/24 times the factor before it, where A = e^(−w) I₀(w),
and B and C are the integrals with (θ − sin θ)² and (θ − sin θ)⁴. Put t = 2 sin(θ/2): then 1 − cos θ = t²/2,
θ − sin θ ≥ t³/6, dθ = dt/√(1 − t²/4) ≥ dt. By (1 − y)^(−1/2) ≤ 1 + y/2 + 3y²/8 + y³(1 − y)^(−1/2), sin(θ/2) ≤ θ/2,
θ − sin θ ≤ θ³/6, 1 − cos θ ≥ 2θ²/π² and Gaussian moments, for w ≥ 1000

    log A ≤ −½ log(2πw) + 1/8w + 1/16w² + 7/w³,    B/A ≥ (5/12)(1 − 1/6w)/w³,    C/A ≤ 2880/w⁶.

Put x = k/μ. By the alternating series of asinh, log(1 + x²) and (1 + x²)^(−1/2), all of whose partial sums bound them,

    w − μ − kτ ≤ μ(−x²/2 + x⁴/24 − x⁶/80 + 5x⁸/896),    −½ log w ≤ −½ log μ − x²/4 + x⁴/8,
    1/8w ≤ (1 − x²/2 + 3x⁴/8)/8μ,    −k²/w³ ≤ −(k²/μ³)(1 − 3x²/2).

With E S² = μ, E S⁴ = 3μ² + μ, E S⁶ = 15μ³ + 15μ² + μ and E S⁸ = 105μ⁴ + 210μ³ + 63μ² + μ this adds up to

    E log P(S) ≤ −½ log(2πeμ) + 1/(48 μ²) + 10/μ³.

*log P(R = k), from below.* Let σ² = μ − 1/12. Over u uniform on [−½, ½], by Jensen and log cosh y ≥ y²/2 − y⁴/12,

    log P(R = k) = log φ_σ(k) + log E[e^(−u²/2σ²) cosh(ku/σ²)] ≥ log φ_σ(k) − 1/24σ² + k²/24σ⁴ − k⁴/960σ⁸,

so that −E log P(R = S) ≤ ½ log(2πeμ) + (1/320 − 1/576)/μ² + 1/μ³. Together KL ≤ (1/48 + 1/720)/μ² + 11/μ³, and
1/48 + 1/720 + 11/4000 < 1/40.  ∎

Divergences of independent coordinates add up, those of releases one after the other too, whatever each was told of
those before (chain rule). Whether units were drawn at random before the noise was added does not matter (joint
convexity). By Pinsker's inequality the total variation between all the releases as they are and as rounded Gaussian
ones is at most √(KL/2). If it is η, and the Gaussian ones are (ε, δ)-private, the real ones are
(ε, δ + (1 + e^ε) η)-private.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec

from .errors import UnsupportedEvent
from .events import Charge, Gaussian, PoissonGaussian, Skellam
from .skellam import SAMPLING_ERROR

LEAST_VARIANCE = 4000
"""From which on the lemma holds; releases with less are not near enough to be worth it anyway."""


def divergence(event: Skellam) -> float:
    """KL between one release's noise and the rounded Gaussian noise of the same variance; infinite where unproved."""
    if event.variance < LEAST_VARIANCE:
        return math.inf
    return event.dim / (40.0 * float(event.variance) ** 2) * (1 + 1e-12)


def twin(event: Skellam) -> Gaussian | PoissonGaussian:
    """The Gaussian mechanism that rounded Gaussian noise of the event's variance is a post-processing of."""
    noise_multiplier = math.sqrt((event.variance - 1 / 12) / event.l2_squared) * (1 - 1e-12)
    if event.sample_rate == 1.0:
        return Gaussian(noise_multiplier)
    return PoissonGaussian(event.sample_rate, noise_multiplier)


def total_variation(events: Sequence[tuple[Skellam, int]]) -> float:
    """Between all these releases as they were sampled, so many of each, and their twins rounded to integers."""
    sampled = math.fsum(count * event.dim * event.shares * SAMPLING_ERROR for event, count in events)
    return math.sqrt(math.fsum(count * divergence(event) for event, count in events) / 2) * (1 + 1e-12) + sampled


def nearest(events: Iterable[tuple[Skellam, int]], most: float) -> tuple[tuple[Skellam, int], ...]:
    """The events that are nearest to their twins, as many as stay within a total variation of ``most`` together."""
    chosen: list[tuple[Skellam, int]] = []
    for event, count in sorted(events, key=lambda pair: (pair[1] * divergence(pair[0]), repr(pair))):
        if total_variation([*chosen, (event, count)]) > most:
            break
        chosen.append((event, count))
    return tuple(chosen)


def stand_in(charges: Sequence[Charge], delta: float, most_epsilon: float) -> tuple[tuple[Charge, ...], float]:
    """The charges with twins for all Skellam noise, and what is left of δ to ask a Gaussian accountant at.

    **Guarantees.** If that accountant finds an ε of at most ``most_epsilon``, the charges cost no more at ``delta``.

    Raises:
        UnsupportedEvent: some of the noise is too coarse: more than half of δ would go for it.
    """
    shared = [(charge.event, charge.count) for charge in charges if isinstance(charge.event, Skellam)]
    left = delta - total_variation(shared) * (1 + math.exp(min(most_epsilon, 700.0)))
    if not left >= delta / 2:
        raise UnsupportedEvent("no accountant bounds a Skellam of so small a variance, other than by RDP")
    twins = (
        msgspec.structs.replace(charge, event=twin(charge.event)) if isinstance(charge.event, Skellam) else charge
        for charge in charges
    )
    return tuple(twins), left
