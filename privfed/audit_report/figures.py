"""The six plots, from the report's own numbers, in the style of the run's page."""

import math
from collections.abc import Sequence

import dp_accounting
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from scipy.special import ndtr

from privfed.report.figures import EPSILON, GLOBAL, HURT, INK, LOCAL, MUTED, PERSONAL, Plot, canvas
from privfed.report.words import delta_text, epsilon_text

from .model import AuditReport, AuditResult, Curve, Pair

_STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MOST_EPSILON = 100.0
_FEW = 4  # up to so many curves are labelled one by one
_COLOURS = (EPSILON, LOCAL, GLOBAL, PERSONAL)  # of audiences


def epsilon_plot(report: AuditReport) -> Plot | None:
    """ε over the rounds on the ledgers, by site and audience; None if nothing is bounded."""
    curves = [curve for curve in report.curves.epsilon if any(value is not None for value in curve.epsilon)]
    if not curves:
        return None
    audiences = list(dict.fromkeys(curve.audience for curve in curves))
    tops = [max(value for value in curve.epsilon if value is not None) for curve in curves]
    budget = report.claim.budget if report.claim.budget and report.claim.budget < 5 * max(tops) else None
    with canvas("audit-epsilon", 440, 290) as drawing:
        axes, labels = drawing.axes, list[tuple[float, str, str]]()
        for number, curve in enumerate(curves):
            colour = _COLOURS[audiences.index(curve.audience) % len(_COLOURS)]
            few = len(curves) <= _FEW
            line = axes.plot(
                curve.across,
                [math.nan if value is None else value for value in curve.epsilon],
                color=colour,
                linewidth=2.2 if few else 1.0,
                alpha=1.0 if few else 0.6,
                marker="o" if len(curve.across) <= 5 else None,
                markersize=4,
                linestyle=_STYLES[number % 4] if few else "-",
            )[0]
            drawing.name(line, f"{', '.join(curve.sites[:20])} towards {curve.audience}")
            if few:
                labels.append((tops[number], _names(curve), colour))
        if len(curves) > _FEW:
            first = max(range(len(curves)), key=lambda number: tops[number])
            labels.append((tops[first], _names(curves[first]), EPSILON))
        if budget is not None:
            axes.axhline(budget, color=HURT, linewidth=1.4, linestyle=(0, (6, 3)))
            drawing.text(axes, f"budget ε = {budget:g}", budget, colour=HURT)
        axes.set_ylim(0, 1.12 * max(*tops, budget or 0.0))
        for (_, text, colour), height in zip(
            sorted(labels), _apart([value for value, _, _ in sorted(labels)], axes.get_ylim()[1]), strict=True
        ):
            axes.annotate(
                text, (curves[0].across[-1], height), xytext=(8, 0), textcoords="offset points", va="center",
                color=colour, annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel("round on the ledgers, all runs in order")
        axes.set_ylabel(f"ε spent so far, {report.claim.unit} unit")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        sites = sum(len(curve.sites) for curve in curves)
        desc = (
            f"ε of {sites} site{'s' if sites != 1 else ''} over {curves[0].across[-1]} rounds, towards "
            f"{_listed(audiences)}. The highest ends at ε = {epsilon_text(max(tops))}, the lowest at "
            f"{epsilon_text(min(tops))}."
        )
        if len(curves) < len(report.curves.epsilon):
            desc += " Some sites have no bound: they are not drawn."
        if report.claim.budget is not None:
            desc += f" The budget is {report.claim.budget:g}."
        return drawing.finish("ε over the rounds, by site and audience", desc)


def accuracy_plot(report: AuditReport) -> Plot | None:
    """Mean scores against the ε that they were reached at."""
    points = report.curves.accuracy
    if not points:
        return None
    metric = report.curves.metric
    with canvas("audit-accuracy", 440, 290) as drawing:
        axes = drawing.axes
        series: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for point in points:
            series.setdefault((point.run, point.model), []).append((point.epsilon, point.score))
        colours = {"personalised": PERSONAL, "global": GLOBAL}
        ends = []
        for number, ((run, model), reached) in enumerate(series.items()):
            line = axes.plot(
                *zip(*reached, strict=True), color=colours[model], linewidth=2.0, marker="o", markersize=3.5,
                linestyle=_STYLES[number // 2 % 4],
            )[0]  # fmt: skip
            drawing.name(line, f"{model} model, run {run}")
            ends.append((*reached[-1], model))
        alone = [line.mean for line in report.utility if line.model.startswith("local only") and line.mean is not None]
        less = report.curves.lower_is_better
        best = (min if less else max)(alone, default=0.0)
        if alone:
            axes.axhline(best, color=LOCAL, linewidth=1.4, linestyle=(0, (4, 2.5)))
            drawing.text(axes, "local only, not private", best, colour=LOCAL)
        scores = [point.score for point in points] + alone
        room = max(0.25 * (max(scores) - min(scores)), 0.02)
        axes.set_ylim(max(0.0, min(scores) - room), max(scores) + room if less else min(1.02, max(scores) + room))
        low, high = axes.get_ylim()
        last = sorted((score, model, epsilon) for epsilon, score, model in ends[-2:])
        for (_, model, epsilon), height in zip(last, _apart([score for score, _, _ in last], high - low), strict=True):
            axes.annotate(
                model, (epsilon, height), xytext=(8, 0), textcoords="offset points", va="center",
                color=colours[model], annotation_clip=False,
            )  # fmt: skip
        axes.set_xlabel(f"largest ε of any site at δ = {delta_text(report.claim.delta)}")
        axes.set_ylabel(f"mean {metric} over sites")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        final = "; ".join(f"{model} {score:.3f} at ε = {epsilon_text(epsilon)}" for epsilon, score, model in ends)
        desc = f"Mean {metric} of the models against ε, as the rounds go by. At the end: {final}."
        if alone:
            desc += f" Local-only models, without noise and alone: {best:.3f}."
        if less:
            desc += " Less is better."
        return drawing.finish(f"ε against {metric}", desc)


def delta_plot(report: AuditReport) -> Plot | None:
    """The pairs (ε, δ) that hold of the chain that has spent most."""
    pairs = _finite(report.curves.delta)
    if len(pairs) < 2 or report.claim.epsilon is None:
        return None
    with canvas("audit-delta", 440, 290) as drawing:
        axes = drawing.axes
        axes.plot([e for _, e in pairs], [d for d, _ in pairs], color=EPSILON, linewidth=2.2)
        axes.plot([report.claim.epsilon], [report.claim.delta], color=INK, marker="o", markersize=7)
        axes.annotate(
            f"claim: ε = {epsilon_text(report.claim.epsilon)}", (report.claim.epsilon, report.claim.delta),
            xytext=(9, 5), textcoords="offset points", color=INK,
        )  # fmt: skip
        axes.set_yscale("log")
        axes.set_ylim(min(d for d, _ in pairs), 0.1)
        axes.set_yticks([10.0**power for power in range(-10, 0, 3)])
        axes.set_yticklabels([delta_text(10.0**power) for power in range(-10, 0, 3)])
        axes.minorticks_off()
        axes.set_xlim(left=0)
        axes.set_xlabel("ε")
        axes.set_ylabel("δ")
        ends = f"from ε = {epsilon_text(pairs[-1][1])} at δ = {delta_text(pairs[-1][0])} to "
        ends += f"ε = {epsilon_text(pairs[0][1])} at δ = {delta_text(pairs[0][0])}"
        return drawing.finish(
            "δ against ε",
            f"The same releases hold a smaller δ at a larger ε: {ends}. The claim is the dot, ε = "
            f"{epsilon_text(report.claim.epsilon)} at δ = {delta_text(report.claim.delta)}.",
        )


def trade_off_plot(report: AuditReport) -> Plot | None:
    """False alarms against misses of the best attack: the claim's curve from below, and where real attacks came to."""
    pairs = _finite(report.curves.delta)
    if not pairs:
        return None
    alpha = np.linspace(0.0, 1.0, 401)
    beta = least_misses(alpha, pairs)
    audited = [audit for audit in report.audits if audit.claimed_epsilon is not None]
    with canvas("audit-trade-off", 440, 330) as drawing:
        axes = drawing.axes
        axes.plot([0, 1], [1, 0], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate("perfect privacy: guessing", (0.5, 0.5), xytext=(8, 6), textcoords="offset points", color=MUTED)
        axes.fill_between(alpha, 0, beta, color=EPSILON, alpha=0.14, linewidth=0)
        axes.plot(alpha, beta, color=EPSILON, linewidth=2.2)
        middle = float(alpha[np.argmin(np.abs(alpha - beta))])
        axes.annotate(
            "no attack gets below", (middle, middle), xytext=(10, 8), textcoords="offset points", color=EPSILON
        )
        worst = max(audited, key=lambda audit: audit.epsilon_lower, default=None)
        for audit in audited:
            x, y = audited_point(audit)
            marker, size = ("D", 7) if audit is worst else ("o", 4)
            mark = axes.plot([x], [y], color=HURT, marker=marker, markersize=size, clip_on=False)[0]
            drawing.name(mark, f"level {audit.level}, {audit.name}: ε ≥ {audit.epsilon_lower:.3g}")
        least = 100 * float(least_misses(np.array([0.01]), pairs)[0])
        desc = (
            "Any attack that tries to tell whether a unit is in the data has false alarms and misses. The curve is the "
            f"least that the claim allows: an attack with 1 % false alarms misses at least {least:.0f} % of the units."
        )
        if worst is not None:
            x, y = audited_point(worst)
            axes.annotate("audited", (x, y), xytext=(9, 7), textcoords="offset points", color=HURT)
            refuted = worst.epsilon_lower > (worst.claimed_epsilon or 0.0)
            desc += f" The strongest audit (level {worst.level}, {worst.name}) shows ε ≥ {worst.epsilon_lower:.3g}, "
            desc += f"{'more than' if refuted else 'not more than'} its claim of {worst.claimed_epsilon:.3g}."
        else:
            desc += " No audit was made, so no audited point is drawn."
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("false alarms")
        axes.set_ylabel("misses")
        return drawing.finish("The trade-off of attacks under the claim", desc)


def membership_plot(report: AuditReport) -> Plot | None:
    """The ROC of membership inference on personal models, on logarithmic axes: what counts is the left end."""
    attacks = [audit for audit in report.audits if len(audit.roc) > 1]
    if not attacks:
        return None
    latest = {(audit.run, audit.name): audit for audit in attacks}  # of attacks that were made again, the last
    least = min(rate for audit in latest.values() for rate, _ in audit.roc if rate > 0)
    low = 10.0 ** math.floor(math.log10(min(least, 0.01)))
    with canvas("audit-membership", 440, 330) as drawing:
        axes, labels = drawing.axes, list[tuple[float, str, str]]()
        axes.plot([low, 1], [low, 1], color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate("guessing", (3 * low, 3 * low), xytext=(10, -10), textcoords="offset points", color=MUTED)
        axes.axvline(0.01, color=MUTED, linewidth=0.8, linestyle=(0, (1, 2)))
        said = []
        for number, audit in enumerate(latest.values()):
            colour = _COLOURS[number % len(_COLOURS)]
            points = [(rate, found) for rate, found in audit.roc if rate > 0 and found > 0]
            line = (
                axes.step(*zip(*points, strict=True), where="post", color=colour, linewidth=1.8)[0] if points else None
            )
            if line is not None:
                drawing.name(line, f"run {audit.run}, {audit.name}")
            short = audit.name.rpartition(", ")[2]
            labels.append((audit.figures["auc"], short, colour))
            area, hits = audit.figures["auc"], 100 * audit.figures["tpr_at_1_percent_fpr"]
            said.append(f"{short}, run {audit.run}: area {area:.3f}, {hits:.1f} % of the members at 1 % false alarms")
        for place, (_, text, colour) in enumerate(labels[:_FEW]):
            axes.annotate(
                text, (0.03, 0.96 - 0.08 * place), xycoords="axes fraction", va="top", color=colour,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, 1)
        axes.set_ylim(low, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g} %"))
        axes.minorticks_off()
        axes.set_xlabel("false alarms: others taken for members")
        axes.set_ylabel("members found")
        return drawing.finish(
            "Membership inference on personal models",
            f"Members found against false alarms, both axes logarithmic; the diagonal is guessing. {'; '.join(said)}.",
        )


def noise_plot(report: AuditReport) -> Plot | None:
    """How much noise each round's sum really carried."""
    rounds = report.curves.noise
    if not rounds:
        return None
    shares = any(line.shares is not None for line in rounds)
    heights = [(line.shares if line.shares is not None else line.sites) for line in rounds]
    numbers = [line.number for line in rounds]
    with canvas("audit-noise", 440, 270) as drawing:
        axes = drawing.axes
        if len(rounds) <= 40:
            axes.bar(numbers, heights, width=0.7, color=EPSILON, alpha=0.45, linewidth=0)
        else:
            axes.fill_between(numbers, 0, heights, step="mid", color=EPSILON, alpha=0.4, linewidth=0)
        least = [(line.number, line.least) for line in rounds if line.least is not None]
        if least:
            axes.plot(*zip(*least, strict=True), color=HURT, linewidth=1.5, linestyle=(0, (6, 3)))
            axes.annotate(
                "least allowed", (1, least[-1][1] or 0), xycoords=("axes fraction", "data"), xytext=(6, 0),
                textcoords="offset points", va="center", color=HURT, annotation_clip=False,
            )  # fmt: skip
        axes.set_ylim(0, 1.12 * max(heights))
        axes.set_xlabel("round on the ledgers, all runs in order")
        axes.set_ylabel("shares of noise in the sum" if shares else "sites with their own full noise")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        weakest = min(line.noise_multiplier for line in rounds)
        what = "shares of noise in a round's sum" if shares else "sites in a round, each with all of its own noise"
        desc = (
            f"{what[0].upper()}{what[1:]}: from {min(heights)} to {max(heights)} over {len(rounds)} "
            f"round{'s' if len(rounds) != 1 else ''}. The weakest noise of any round has a multiplier of {weakest:.4g}."
        )
        if least:
            desc += f" No sum may carry fewer than {min(count or 0 for _, count in least)}."
        return drawing.finish("Realised noise, round by round", desc)


def least_misses(alpha: NDArray[np.float64], pairs: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """float64[n]: the least rate of misses at each rate of false alarms, if every (δ, ε) of `pairs` holds.

    Source: Kairouz, Oh and Viswanath 2015: β ≥ max(0, 1 − δ − e^ε·α, e^−ε·(1 − δ − α)).
    """
    best = np.zeros_like(alpha)
    for delta, epsilon in pairs:
        factor = math.exp(min(epsilon, 700.0))
        best = np.maximum(best, np.maximum(1 - delta - factor * alpha, (1 - delta - alpha) / factor))
    return best


def audited_point(audit: AuditResult) -> tuple[float, float]:
    """(false alarms, misses) of an attack: as it measured them, or where the Gaussian mechanism of its (ε, δ) has as
    many of both, Φ(−μ/2)."""
    measured = [audit.figures.get(name) for name in ("fpr_upper", "fnr_upper")]
    if measured[0] is not None and measured[1] is not None:
        return measured[0], measured[1]
    lower = min(audit.epsilon_lower, _MOST_EPSILON)
    if lower <= 0:
        return 0.5, 0.5
    mu = 1 / dp_accounting.get_sigma_gaussian(lower, audit.delta or 1e-5)
    place = float(ndtr(-mu / 2))
    return place, place


def _finite(pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    return [(pair.delta, pair.epsilon) for pair in pairs if pair.epsilon is not None]


def _names(curve: Curve) -> str:
    if len(curve.sites) > 1:
        return f"{len(curve.sites)} sites"
    name = curve.sites[0]
    return name if len(name) <= 14 else name[:13] + "…"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _apart(values: Sequence[float], span: float) -> list[float]:
    """Heights for labels, from below, far enough apart to be read."""
    heights: list[float] = []
    for value in values:
        heights.append(max(value, heights[-1] + 0.065 * span) if heights else value)
    return heights
