"""What a run looks like: a live table on a terminal, plain lines in a pipe."""

from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from privfed.api import Preparation, Run
from privfed.cohort import cohort_of
from privfed.engines.contract import Progress
from privfed.federation import RoundReport
from privfed.figures import Released
from privfed.noise_levels import evaluations, figures_target
from privfed.privacy.events import PrivacyUnit
from privfed.summary import STATUS, AdversarySummary, FigureSummary, Summary, sampling
from privfed.terms import claimed_colluders, shares_noise

_VISIBLE_ROUNDS = 12


class Display:
    """Shows a run as it goes.

    Args:
        to_stderr: keep stdout for JSON.
        console: where to show it; default that stream.
    """

    def __init__(self, *, to_stderr: bool, console: Console | None = None) -> None:
        self._console = console or Console(stderr=to_stderr, highlight=False, markup=False, soft_wrap=True)
        self._rich = self._console.is_terminal
        self._rows: list[tuple[str, ...]] = []
        self._live: Live | None = None
        self._progress = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), console=self._console,
        )  # fmt: skip

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """A spinner on a terminal, a line elsewhere."""
        if self._rich:
            return self._console.status(what + " …")
        self._console.print(what + " …")
        return nullcontext()

    def start(self, ready: Preparation) -> None:
        """Say what is about to run and what it promises."""
        config, data = ready.config, ready.data
        kind = "one table cut into sites that never existed" if data.simulated else "real sites"
        sizes = ", ".join(f"{name} {len(records)}" for name, records in list(data.sites.items())[:8])
        more = f", … ({len(data.sites)} sites)" if len(data.sites) > 8 else ""
        self._console.print(f"privfed run: {data.description} ({kind})")
        self._console.print(f"  records      {sizes}{more}")
        self._console.print(f"  method       {type(config.method).__struct_config__.tag}, {config.rounds} rounds")
        self._console.print(f"  privacy      {_claim(ready)}")
        if config.method.sends:
            self._console.print(f"  aggregation  {_aggregation(ready)}")
        for term, text in _beside(ready):
            self._console.print(f"  {term:<12} {text}")
        for note in data.notes:
            self._console.print(f"  note         {note}")
        if config.privacy.insecure_seed is not None:
            self._console.print("  WARNING      privacy.insecure_seed: anyone can recompute the noise; ε is void")
        self._steps = self._progress.add_task("rounds", total=config.rounds)
        self._step = self._progress.add_task("", total=None, visible=False)
        self._metric = config.metric
        self._delta = config.privacy.delta
        self._by_noise = config.evaluation.release == "private"
        self._void = " VOID" if config.privacy.insecure_seed is not None else ""

    def __enter__(self) -> "Display":
        if self._rich:
            self._live = Live(self.picture(), console=self._console, refresh_per_second=8, transient=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.update(self._step, visible=False)
        if self._live is not None:
            self._live.stop()

    def step(self, progress: Progress) -> None:
        """Show, on a terminal, how far the round is: with thousands of sites it takes minutes."""
        if progress.what != self._progress.tasks[self._step].description:
            self._progress.reset(self._step, description=progress.what, visible=True)
        self._progress.update(self._step, completed=progress.done, total=progress.of)

    def round(self, report: RoundReport) -> None:
        """Show one more round."""
        loss, score, personal = (report.figures(name) for name in ("loss", "global_score", "personalized"))
        row = (
            str(report.round + 1),
            f"{loss.mean:.4f}" if loss else "–",
            _released(report.released) if report.released else f"{score.mean:.4f}" if score else "–",
            f"{personal.mean:.4f}" if personal else "–",
            f"{report.epsilon:.3f}{self._void}" if report.epsilon is not None else "–",
            f"{len(report.contributed)}/{len(report.invited)}",
            _bytes(report.bytes_up),
        )
        if report.round and not self._rows:  # of a run that goes on
            self._progress.reset(self._steps, completed=report.round)
        self._rows.append(row)
        self._progress.advance(self._steps)
        if self._live is not None:
            self._live.update(self.picture())
        else:
            names = ("round", "loss", "global", "personalized", "epsilon_max", "sites", "bytes_up")
            shown = [(name, value) for name, value in zip(names, row, strict=True) if not self._hidden(name)]
            self._console.print("  ".join(f"{name} {value}" for name, value in shown))
        console = self._live.console if self._live is not None else self._console
        for site, reason in report.refused.items():
            console.print(f"  {site} refuses: {reason}")
        if report.aborted:
            console.print(f"  round {report.round + 1} released nothing: {report.aborted}")

    def _hidden(self, name: str) -> bool:
        """Figures that stay inside leave no column behind."""
        return self._by_noise and name in ("loss", "personalized")

    def finish(self, result: Run) -> None:
        """The summary and where everything is."""
        summary = result.summary
        if self._by_noise:
            self._console.print(_released_line(summary))
        else:
            self._console.print(_summary_table(summary))
        self._console.print(_verdict(summary))
        for site, reason in summary.refusals.items():
            self._console.print(f"  {site}: {reason}")
        self._console.print(f"run folder: {result.folder} (open report.html in it: it also explains every word)")

    def picture(self) -> Group:
        """The rounds so far, and how far this one is."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        headings = {
            "round": "round",
            "loss": "loss",
            "global": f"global {self._metric}",
            "personalized": f"personalized {self._metric}",
            "epsilon_max": f"ε max (δ={self._delta:g})",
            "sites": "sites",
            "bytes_up": "up per site",
        }
        kept = [number for number, name in enumerate(headings) if not self._hidden(name)]
        for number in kept:
            table.add_column(list(headings.values())[number], justify="right")
        for row in self._rows[-_VISIBLE_ROUNDS:]:
            table.add_row(*(row[number] for number in kept))
        return Group(table, self._progress)


def _released(released: Released) -> str:
    """A noised figure with what its noise does to it."""
    if released.score is None:
        return "– (noise)"
    return f"{released.score:.3f} ± {released.deviation:.3f}" if released.deviation else f"{released.score:.3f}"


def _claim(ready: Preparation) -> str:
    privacy = ready.config.privacy
    if not ready.config.method.sends:
        return "nothing leaves a site, so the others learn nothing"
    if privacy.unit is PrivacyUnit.NONE:
        return "none: this run makes no differential-privacy claim"
    goal = f"target ε = {privacy.target_epsilon:g}" if privacy.noise_multiplier is None else "fixed noise"
    return (
        f"{privacy.unit.value} unit, {privacy.noise.value} noise, {goal} at δ = {privacy.delta:g} "
        f"(σ/C = {ready.noise_multiplier:.4g}, {sampling(ready.config)})"
    )


def _beside(ready: Preparation) -> list[tuple[str, str]]:
    """Lines of the header about noise in shares and about what is released beside the updates."""
    config, lines = ready.config, []
    evaluation = config.evaluation
    if shares_noise(config):
        cohort = cohort_of(config, len(ready.training))
        colluders = claimed_colluders(config, cohort)
        lines.append(
            (
                "shares",
                f"each site adds one share of the noise: {cohort.minimum_cohort - colluders} of them are enough for "
                f"the target, the fewest in a sum ({cohort.minimum_cohort}) less {colluders} that may collude",
            )
        )
    if config.privacy.clip == "adaptive":
        start, aim = config.privacy.max_update_norm, config.privacy.clip_quantile
        lines.append(("clip", f"starts at {start:g} and follows a noised count: {aim:.0%} of the sites below it"))
    if config.privacy.schedule == "spend":
        lines.append(("schedule", "planned for sums of all sites; after one without some of them, the noise grows"))
    if config.privacy.standardise_epsilon is not None:
        lines.append(
            ("inputs", f"standardised by noised means, ε = {config.privacy.standardise_epsilon:g} of the target")
        )
    if evaluation.release == "private":
        times = evaluations(config)
        lines.append(
            (
                "figures",
                f"released through noise, ε = {figures_target(config):g} for {_counted(times, 'measurement')} of all "
                "test records together",
            )
        )
    elif evaluation.release == "public-cohort":
        lines.append(("figures", f"exact, of the public sites alone: {', '.join(evaluation.public_sites)}"))
    if evaluation.patience is not None:
        lines.append(("stopping", f"after {_counted(evaluation.patience, 'measurement')} without a better figure"))
    return lines


def _aggregation(ready: Preparation) -> str:
    config, n = ready.config, len(ready.training)
    cohort = cohort_of(config, n)
    if config.aggregation.kind == "plain":
        return "plain: the server sees every update"
    spare = cohort.tolerated_dropouts
    dropouts = f"tolerates {spare} dropout{'s' if spare != 1 else ''} a round" if spare else "tolerates no dropout"
    if config.aggregation.kind == "homomorphic":
        holder = config.aggregation.key_holder or "a key holder of its own"
        return (
            f"homomorphic (heagg/1), key with {holder}: the server sees the sum of at least {n - spare} of {n}, unless "
            f"the two collude; {dropouts}"
        )
    return (
        f"masked (secagg/1): the server sees the sum of at least {n - spare} of {n}; "
        f"threshold {cohort.threshold}, {dropouts}"
    )


def _summary_table(summary: Summary) -> Table:
    table = Table(title=None, header_style="bold", box=None, pad_edge=False)
    table.add_column(summary.utility.metric)
    for heading in ("mean over sites", "worst decile", "sd"):
        table.add_column(heading, justify="right")
    rows: tuple[tuple[str, FigureSummary], ...] = (
        ("global model", summary.utility.global_),
        ("personalized", summary.utility.personalized),
        ("local only, not private", summary.utility.local_only),
    )
    for name, figure in rows:
        table.add_row(
            name, *(f"{v:.4f}" if v is not None else "–" for v in (figure.mean, figure.worst_decile, figure.sd))
        )
    return table


def _released_line(summary: Summary) -> str:
    figure, deviation = summary.utility.global_.mean, summary.utility.noise_deviation
    shown = "nothing to read in the noise" if figure is None else f"{figure:.3f}"
    if figure is not None and deviation is not None:
        shown += f" ± {deviation:.3f}"
    return f"{summary.utility.metric} of the global model: {shown}"


def _verdict(summary: Summary) -> str:
    privacy, hurt = summary.privacy, summary.utility.fraction_hurt
    lines = [_about_figures(summary)]
    if hurt is not None:
        some = "public sites" if summary.utility.status == STATUS["public-cohort"] else "sites"
        lines.append(f"{hurt:.0%} of {some} have a personalized model worse than their own local-only one")
    if (unseen := summary.utility.unseen) is not None and unseen.personalized.mean is not None:
        several = unseen.sites != 1
        line = f"{unseen.sites} site{'s' if several else ''} that took no part: {summary.utility.metric} "
        line += f"{unseen.personalized.mean:.4f} after adapting the model to {'themselves' if several else 'itself'}"
        line += f", worst decile {unseen.personalized.worst_decile:.4f}" if several else ""
        if unseen.global_.mean is not None and unseen.local_only.mean is not None:
            line += f"; {unseen.global_.mean:.4f} without adapting, {unseen.local_only.mean:.4f} alone"
        lines.append(line)
    if privacy.epsilon.max is not None:
        void = " VOID: the noise seed is known" if privacy.insecure_seed else ""
        lines.append(
            f"ε = {privacy.epsilon.max:.4g} at δ = {privacy.delta:g}, {privacy.unit} unit, {_against(summary)} "
            f"({privacy.noise} noise, {privacy.sampling}, {privacy.accountant} accountant){void}"
        )
        if privacy.noise != "local" or privacy.colluders is not None:
            lines += [_adversary(line) for line in privacy.adversaries]
    if summary.stopped_early:
        lines.append(f"stopped early, after {summary.rounds} of {summary.rounds_planned} rounds: no better figure came")
    if summary.kept_round is not None:
        lines.append(f"kept the model of round {summary.kept_round + 1}, the best by its figure")
    if not summary.complete:
        lines.append(f"INCOMPLETE: {summary.rounds} of {summary.rounds_planned} rounds")
    return "\n".join(lines)


def _about_figures(summary: Summary) -> str:
    match summary.utility.status:
        case "internal, not DP":
            return "(internal, not DP: these figures are the sites' own and were not noised)"
        case "of the public sites alone":
            return "(exact figures of the public sites; the others' stay with them)"
    return (
        "(released through noise and counted in ε; all test records together, so there is no spread over sites. The "
        "figures of personal models stay at their sites)"
    )


def _against(summary: Summary) -> str:
    privacy = summary.privacy
    if privacy.noise == "central":
        return "against everybody but the server, which adds the noise and is trusted"
    if privacy.colluders is None:
        return "against whoever sees all that leaves a site"
    if privacy.colluders == 0:
        return "against the server, if no site works with it"
    some = "one site that works" if privacy.colluders == 1 else f"up to {privacy.colluders} sites that work"
    apart = ", while it and the key holder stay apart" if summary.aggregation.kind == "homomorphic" else ""
    return f"against the server and {some} with it{apart}"


def _adversary(line: AdversarySummary) -> str:
    who = f"server and {_counted(line.colluders, 'site')}" if line.colluders else line.adversary
    bound = f"ε = {line.epsilon:.4g}" if line.epsilon is not None else "no bound"
    return f"  {who:<22} {bound:<10}  {line.reason}"


def _counted(count: int, what: str) -> str:
    return f"one {what}" if count == 1 else f"{count} {what}s"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
