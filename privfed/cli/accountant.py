"""``privfed accountant``: what a mechanism costs, and what stands in ledgers."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import accountant_report, ledger
from .checks import check_delta
from .output import print_json

if TYPE_CHECKING:
    from privfed.privacy.events import Charge
    from privfed.privacy.opinions import Opinion

app = typer.Typer(help="What a mechanism costs; what stands in ledgers.", no_args_is_help=True, rich_markup_mode=None)

Noise = Annotated[
    list[float] | None,
    typer.Option("--noise-multiplier", "-z", metavar="Z", help="σ/C of the Gaussian noise; repeat for segments."),
]
Rate = Annotated[
    list[float] | None,
    typer.Option("--sample-rate", "-q", metavar="Q", help="Chance of a unit to be drawn in a step [default: 1]."),
]
Steps = Annotated[
    list[int] | None, typer.Option("--steps", "-n", metavar="N", help="Steps [default: 1]; repeat for segments.")
]
Events = Annotated[
    Path | None,
    typer.Option("--events", metavar="FILE", help='JSON, a list of {"event": {"type": …}, "count": …}, instead.'),
]
Delta = Annotated[float, typer.Option("--delta", help="δ.")]
Method = Annotated[
    str, typer.Option("--accountant", metavar="pld|rdp|prv|all", help="pld: the least of PLD and RDP; all: compare.")
]
Adjacent = Annotated[
    str, typer.Option("--adjacency", metavar="add-or-remove-one|replace-one", help="What neighbouring data sets are.")
]
Sampling = Annotated[
    str, typer.Option("--sampling", metavar="poisson", help="How a step's units are drawn. Shuffling is refused.")
]
Unit = Annotated[
    str, typer.Option("--unit", metavar="record|patient|client", help="What a neighbour adds; for the text.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="A picture too: .svg, .png or .pdf.")]


@app.command()
def epsilon(
    noise_multiplier: Noise = None,
    sample_rate: Rate = None,
    steps: Steps = None,
    delta: Delta = 1e-5,
    events: Events = None,
    accountant: Method = "pld",
    adjacency: Adjacent = "add-or-remove-one",
    sampling: Sampling = "poisson",
    unit: Unit = "record",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """ε of a mechanism at a δ."""
    if accountant == "all":
        compare(noise_multiplier, sample_rate, steps, delta, events, adjacency, sampling, unit, as_json)
        return
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.opinions import METHODS, epsilon_by

    _one_of("--accountant", accountant, (*METHODS, "all"))
    charges = _charges(noise_multiplier, sample_rate, steps, events, adjacency, sampling, unit)
    check_delta(delta)
    ours = Accountant()
    answer = epsilon_by(accountant, charges, delta, ours)
    if plot is not None:
        _plot_steps(charges, delta, ours, plot)
    if as_json:
        _print_answer(answer, delta, noise_multiplier, unit, adjacency)
        return
    value = "∞" if answer.epsilon is None or math.isinf(answer.epsilon) else f"{answer.epsilon:.6g}"
    typer.echo(f"ε = {value} at δ = {delta:g} for one {unit} ({adjacency}), by {answer.accountant.upper()}")
    moves = f"; its grid still moves it by at most {answer.tolerance:.2%}" if answer.tolerance else ""
    typer.echo(f"  an upper bound{moves}")
    if answer.note:
        typer.echo(f"  note: {answer.note}")


@app.command("delta")
def delta_(
    epsilon: Annotated[float, typer.Option("--epsilon", min=0.0, help="ε.")],
    noise_multiplier: Noise = None,
    sample_rate: Rate = None,
    steps: Steps = None,
    events: Events = None,
    adjacency: Adjacent = "add-or-remove-one",
    sampling: Sampling = "poisson",
    unit: Unit = "record",
    as_json: AsJson = False,
) -> None:
    """δ of a mechanism at an ε."""
    from privfed.errors import ConfigError
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.opinions import delta_for

    if not math.isfinite(epsilon):
        raise ConfigError(f"--epsilon must be finite, got {epsilon:g}")
    charges = _charges(noise_multiplier, sample_rate, steps, events, adjacency, sampling, unit)
    ours = Accountant()
    delta = delta_for(epsilon, charges, ours)
    if as_json:
        method = ours.epsilon(charges, min(delta, 0.5))
        print_json(
            {
                "epsilon": epsilon,
                "delta": delta,
                "noise_multiplier": noise_multiplier,
                "accountant": method.accountant,
                "tolerance": method.tolerance,
                "unit": unit,
                "adjacency": adjacency,
            }
        )
        return
    typer.echo(f"δ = {delta:.4g} at ε = {epsilon:g} for one {unit} ({adjacency})")


@app.command()
def calibrate(
    epsilon: Annotated[float, typer.Option("--epsilon", help="The target ε.")],
    delta: Delta = 1e-5,
    sample_rate: Rate = None,
    steps: Steps = None,
    sampling: Sampling = "poisson",
    unit: Unit = "record",
    as_json: AsJson = False,
) -> None:
    """The least noise that a target ε allows."""
    from privfed.errors import ConfigError
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.calibration import noise_multiplier_for
    from privfed.privacy.opinions import segments

    _check_sampling(sampling)
    check_delta(delta)
    rates, counts = sample_rate or [1.0], steps or [1]
    ours = Accountant()

    def plan(noise_multiplier: float) -> "tuple[Charge, ...]":
        return segments([noise_multiplier], rates, counts)

    try:
        z = noise_multiplier_for(epsilon, delta, plan, ours)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from None
    reached = ours.epsilon(plan(z), delta)
    if as_json:
        print_json(
            {
                "noise_multiplier": z,
                "epsilon": reached.value,
                "target_epsilon": epsilon,
                "delta": delta,
                "accountant": reached.accountant,
                "tolerance": reached.tolerance,
                "unit": unit,
            }
        )
        return
    typer.echo(f"noise multiplier σ/C = {z:g}: ε = {reached.value:.6g} at δ = {delta:g} for one {unit}")


@app.command()
def compare(
    noise_multiplier: Noise = None,
    sample_rate: Rate = None,
    steps: Steps = None,
    delta: Delta = 1e-5,
    events: Events = None,
    adjacency: Adjacent = "add-or-remove-one",
    sampling: Sampling = "poisson",
    unit: Unit = "record",
    as_json: AsJson = False,
) -> None:
    """Every accountant side by side, each with its tolerance."""
    from privfed.privacy.accountant import Accountant
    from privfed.privacy.opinions import opinions

    charges = _charges(noise_multiplier, sample_rate, steps, events, adjacency, sampling, unit)
    check_delta(delta)
    answers = opinions(charges, delta, Accountant())
    if as_json:
        print_json({"delta": delta, "unit": unit, "adjacency": adjacency, "accountants": list(answers)})
        return
    typer.echo(f"ε at δ = {delta:g} for one {unit} ({adjacency}); every figure is an upper bound")
    for answer in answers:
        value = "–" if answer.epsilon is None else f"{answer.epsilon:.6g}"
        typer.echo(f"  {answer.accountant:<40} {value:>12}   ± {answer.tolerance:.2g}   {answer.note}".rstrip())


@app.command()
def curve(
    noise_multiplier: Noise = None,
    sample_rate: Rate = None,
    steps: Steps = None,
    events: Events = None,
    adjacency: Adjacent = "add-or-remove-one",
    sampling: Sampling = "poisson",
    unit: Unit = "record",
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """ε against δ, from 1e-10 to 0.1."""
    from privfed.privacy.accountant import Accountant

    charges = _charges(noise_multiplier, sample_rate, steps, events, adjacency, sampling, unit)
    ours = Accountant()
    deltas = [10.0**power for power in range(-10, 0)]
    points = [(delta, ours.epsilon(charges, delta).value) for delta in deltas]
    if plot is not None:
        _plot(plot, [value for _, value in points], deltas, "ε", "δ", log=True)
    if as_json:
        print_json({"unit": unit, "adjacency": adjacency, "points": [{"delta": d, "epsilon": e} for d, e in points]})
        return
    typer.echo(f"for one {unit} ({adjacency})")
    for delta, value in points:
        typer.echo(f"  δ = {delta:<8g} ε = {value:.6g}")


app.command("show")(ledger.show)
app.command("verify")(ledger.verify)
app.command("export")(ledger.export)
app.command("compose")(ledger.compose)
app.command("keygen")(ledger.keygen)
app.command("report")(accountant_report.report)


def _charges(
    noise_multiplier: list[float] | None,
    sample_rate: list[float] | None,
    steps: list[int] | None,
    events: Path | None,
    adjacency: str,
    sampling: str,
    unit: str,
) -> "tuple[Charge, ...]":
    """What the command line, or the file, says has happened."""
    from privfed.errors import ConfigError

    _one_of("--unit", unit, ("record", "patient", "client"))
    _one_of("--adjacency", adjacency, ("add-or-remove-one", "replace-one"))
    _check_sampling(sampling)
    if (events is None) == (noise_multiplier is None):
        raise ConfigError("give either --noise-multiplier (with --sample-rate and --steps) or --events FILE")
    import msgspec  # the slow part comes after what can be refused at once

    from privfed.privacy.events import Charge
    from privfed.privacy.opinions import replaced, segments

    if events is None:
        try:
            charges = segments(noise_multiplier or [], sample_rate or [1.0], steps or [1])
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from None
    else:
        try:
            charges = tuple(msgspec.json.decode(events.read_bytes(), type=list[Charge]))
        except OSError as error:
            raise ConfigError(f"can not read {events}: {error.strerror}") from None
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{events} is no list of events: {error}") from None
        if not charges:
            raise ConfigError(f"{events} holds no event")
    return replaced(charges) if adjacency == "replace-one" else charges


def _check_sampling(sampling: str) -> None:
    from privfed.errors import ConfigError

    if sampling in ("shuffle", "shuffled", "shuffling"):
        raise ConfigError(
            "--sampling shuffle: an epoch over shuffled records is not a Poisson sample, and its ε is larger than the "
            "Poisson one (0.72 would be reported where at least 4.06 is true): no accountant here bounds it"
        )
    _one_of("--sampling", sampling, ("poisson",))


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from privfed.errors import ConfigError

    if value not in allowed:
        raise ConfigError(f"{option} {value}: it must be one of {', '.join(allowed)}")


def _print_answer(
    answer: "Opinion", delta: float, noise_multiplier: list[float] | None, unit: str, adjacency: str
) -> None:
    finite = answer.epsilon is not None and math.isfinite(answer.epsilon)
    print_json(
        {
            "epsilon": answer.epsilon if finite else None,
            "delta": delta,
            "noise_multiplier": noise_multiplier,
            "accountant": answer.accountant,
            "tolerance": answer.tolerance,
            "unit": unit,
            "adjacency": adjacency,
            "note": answer.note,
        }
    )


def _plot_steps(charges: "tuple[Charge, ...]", delta: float, accountant: object, path: Path) -> None:
    """ε as the steps go by, at up to 50 points."""
    import msgspec

    from privfed.privacy.accountant import Accountant

    assert isinstance(accountant, Accountant)
    total = sum(charge.count for charge in charges)
    wanted = sorted({max(1, round(total * part / 50)) for part in range(1, 51)})
    values = []
    for steps in wanted:
        left, taken = steps, []
        for charge in charges:
            if left:
                taken.append(msgspec.structs.replace(charge, count=min(left, charge.count)))
                left -= taken[-1].count
        values.append(accountant.epsilon(taken, delta).value)
    _plot(path, wanted, values, "steps", f"ε at δ = {delta:g}", log=False)


def _plot(path: Path, across: list[float] | list[int], up: list[float], x: str, y: str, *, log: bool) -> None:
    from matplotlib.figure import Figure

    from privfed.errors import ConfigError

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(across, up, marker="." if log else None)
    axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"can not write {path}: {error}") from None
    typer.echo(f"plot: {path}", err=True)
