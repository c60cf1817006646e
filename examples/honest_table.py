"""The honest table of a configuration: what the run gives, and what it would give without privacy.

    python examples/honest_table.py examples/heart.toml [--set key=value …] [--out FOLDER]

Runs it as it is and once with `privacy.unit = "none"`, and prints the mean over sites of the global model, of the
personalised models, and of models that each site trains alone, with the share of sites that the run hurts.
"""

import argparse
import tempfile
from pathlib import Path

import privfed
from privfed.summary import Summary
from privfed.tasks import LOWER_IS_BETTER

OPEN = ("privacy.unit=none", "privacy.noise=local", "evaluation.release=internal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, help="a new folder for both runs; default none is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        private = privfed.run(privfed.load_config(given.config, given.overrides), out=folder / "private").summary
        clear = privfed.run(privfed.load_config(given.config, [*given.overrides, *OPEN]), out=folder / "open").summary
    print(table(private, clear))


def table(private: Summary, clear: Summary) -> str:
    """Markdown."""
    spent, metric = private.privacy.epsilon.max, private.utility.metric
    claim = "no claim" if spent is None else f"ε ≤ {spent:.3g}, δ = {private.privacy.delta:g}, {private.privacy.unit}"
    better = "less" if metric in LOWER_IS_BETTER else "more"
    kind = "simulated" if private.simulated else "real"
    lines = [
        f"{private.sites} {kind} sites, {claim}. {metric}, {better} is better; mean over sites (worst tenth).",
        "",
        "| | with privacy | without |",
        "|---|---|---|",
    ]
    for name, field in (("global", "global_"), ("personalised", "personalized"), ("local only", "local_only")):
        cells = []
        for summary in (private, clear):
            figure = getattr(summary.utility, field)
            cells.append("–" if figure.mean is None else f"{figure.mean:.3f} ({figure.worst_decile:.3f})")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    for name, field in (("worse than local", "fraction_hurt"), ("worse than global", "fraction_hurt_versus_global")):
        shares = [getattr(summary.utility, field) for summary in (private, clear)]
        shown = ["–" if share is None else f"{share:.0%}" for share in shares]
        lines.append(f"| sites whose personal model is {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
