"""report.html: what stands on it, that it is one safe file, and that a browser shows it."""

import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

import privfed
from privfed import config_io, report
from privfed.cli.app import app
from privfed.errors import ConfigError, RunFolderError
from privfed.evaluation import fraction_hurt, spread
from privfed.report.words import delta_text, epsilon_text
from privfed.summary import (
    STATUS,
    AdversarySummary,
    AggregationSummary,
    EpsilonSummary,
    FigureSummary,
    PrivacySummary,
    Summary,
    UtilitySummary,
)

EVIL = '<script>alert("x")</script> & $\\frac$ "é\n'
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
_VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


# Folders


def make_folder(
    path: Path,
    sites: Sequence[str],
    *,
    rounds: int = 6,
    overrides: Sequence[str] = (),
    epsilon_step: float | None = 0.3,
    uneven: bool = False,
    refusals: dict[str, str] | None = None,
    aborted: dict[int, str] | None = None,
    leaves: str | None = None,
    silent: Sequence[str] = (),
    undefined: Sequence[str] = (),
    simulated: bool = True,
    complete: bool = True,
    stopped_early: bool = False,
    kept_round: int | None = None,
) -> Path:
    """A run's folder as `privfed run` leaves it, with invented figures.

    Args:
        leaves: a site that is not invited after the first round.
        silent: sites that never measure anything. undefined: sites whose figures are all None.
        uneven: every site spends at its own pace.
    """
    config = config_io.load_config(overrides=[f"rounds={rounds}", *overrides])
    aborted, refusals = aborted or {}, refusals or {}
    draw = np.random.default_rng(7)
    skill = {site: draw.normal(0.86, 0.05) for site in sites}
    alone = {site: draw.normal(0.84, 0.07) for site in sites}
    pace = {site: draw.uniform(0.4, 1.0) if uneven else 1.0 for site in sites}
    release, public = config.evaluation.release, config.evaluation.public_sites
    lines: list[dict[str, Any]] = []
    latest: dict[str, dict[str, Any]] = {}
    for number in range(rounds if complete else rounds // 2):
        figures: dict[str, Any] = {}
        for site in sites:
            if site in silent:
                continue
            better = 0.10 * math.exp(-number / 3)
            hidden = release == "private" or (release == "public-cohort" and site not in public)
            value = {
                "type": "measurement",
                "records": 20 + len(site),
                "loss": math.nan if site in undefined else 0.4,
                "global_score": None if site in undefined else min(1.0, skill[site] - better - 0.02),
                "personalized": None if site in undefined else min(1.0, skill[site] - better / 2),
                "local_only": None if site in undefined else min(1.0, alone[site]),
                "epsilon": None if epsilon_step is None else epsilon_step * math.sqrt(number + 1) * 3 * pace[site],
            }
            if hidden:
                value |= {"records": 0, "loss": None, "global_score": None, "personalized": None, "local_only": None}
            figures[site] = latest[site] = value
        gone = list(sites[:1]) if number == 1 and len(sites) > 4 else []
        lines.append(
            {
                "run": "made",
                "round": number,
                "invited": [site for site in sites if number == 0 or site != leaves],
                "contributed": [] if number in aborted else [site for site in sites if site not in (*gone, leaves)],
                "dropped": {"mask": gone} if gone else {},
                "refused": refusals if number == 0 else {},
                "aborted": aborted.get(number),
                "bytes_up_per_site": 1727.0,
                "sites": figures,
                "released": {"score": 0.7 + 0.03 * number, "deviation": 0.05} if release == "private" else None,
            }
        )

    def figure(name: str) -> FigureSummary:
        values = spread([value[name] for value in latest.values()])
        return FigureSummary(values.mean, values.worst_decile, values.sd) if values else FigureSummary(None, None, None)

    def column(name: str) -> dict[str, float | None]:
        return {site: value[name] for site, value in latest.items()}

    spent = {site: latest[site]["epsilon"] if site in latest else None for site in sites}
    known = [value for value in spent.values() if value is not None]
    invented = ADVERSARIES.get(config.privacy.noise.value, ()) if config.aggregation.kind == "masked" else ()
    last = lines[-1]["released"]
    private = config.privacy.unit.value != "none"
    summary = Summary(
        run="made",
        rounds=len(lines),
        rounds_planned=rounds,
        complete=complete,
        sites=len(sites),
        simulated=simulated,
        seconds=1.5,
        stopped_early=stopped_early,
        kept_round=kept_round,
        method=str(type(config.method).__struct_config__.tag),
        refusals=refusals,
        privacy=PrivacySummary(
            unit=config.privacy.unit.value,
            noise=config.privacy.noise.value,
            delta=config.privacy.delta,
            epsilon=EpsilonSummary(max(known, default=0.0) if private else None, spent),
            noise_multiplier=3.5,
            accountant="pld" if private else "none",
            adjacency="add-or-remove-one",
            sampling="Poisson, rate 0.5",
            insecure_seed=config.privacy.insecure_seed is not None,
            adversaries=tuple(AdversarySummary(*line) for line in invented),
            colluders=2 if config.privacy.noise.value == "distributed" else None,
        ),
        utility=UtilitySummary(
            metric=config.metric,
            global_=FigureSummary(last["score"], None, None) if last else figure("global_score"),
            personalized=figure("personalized"),
            local_only=figure("local_only"),
            fraction_hurt=fraction_hurt(column("personalized"), column("local_only")),
            fraction_hurt_versus_global=fraction_hurt(column("personalized"), column("global_score")),
            status=STATUS[release],
            noise_deviation=last["deviation"] if last else None,
        ),
        aggregation=AggregationSummary(
            kind=config.aggregation.kind if config.method.sends else "none",
            bytes_up_per_site_per_round=1727.0,
            dropouts=1,
            aborted_rounds=len(aborted),
        ),
    )
    path.mkdir(parents=True)
    (path / "config.toml").write_text(config_io.to_toml(config), encoding="utf-8")
    (path / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    with open(path / "metrics.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


# Invented, but in the order that they have in a run
ADVERSARIES: dict[str, Sequence[tuple[str, int, float | None, str]]] = {
    "distributed": (
        ("external model user", 0, 1.6, "all shares of the noise"),
        ("curious server", 0, 1.6, "all shares of the noise"),
        ("one other site", 0, 1.8, "all shares but its own"),
        ("server and colluding sites", 2, 2.2041, "all shares but theirs"),
        ("server and colluding sites", 4, 4.4, "the site's own share alone"),
    ),
    "central": (
        ("external model user", 0, 2.2041, "the server's noise"),
        ("curious server", 0, None, "the server adds the noise and sees the sum without it: it is trusted"),
        ("one other site", 0, 2.2041, "the server's noise"),
    ),
}
SHARED = ["privacy.noise='distributed'", "method.name='fedsgd'"]
FIVE = [f"hospital-{number}" for number in range(1, 6)]
REASON = "policy.max_delta = 0.001, the plan has delta = 0.01"
CASES: dict[str, dict[str, Any]] = {
    "plain-run": {"sites": FIVE},
    "one-round": {"sites": FIVE, "rounds": 1},
    "thirty-real": {"sites": [f"St. Mary's {n}" for n in range(30)], "uneven": True, "simulated": False},
    "two-hundred": {"sites": [f"clinic-{n:03d}" for n in range(200)], "uneven": True, "rounds": 12},
    "missing": {"sites": FIVE, "silent": FIVE[:1], "undefined": FIVE[1:3]},
    "nothing-measured": {"sites": FIVE, "silent": FIVE},
    "refusal": {
        "sites": FIVE,
        "refusals": {"hospital-2": REASON},
        "aborted": {1: "3 of 5 answered", 2: "2 of 5"},
        "complete": False,
    },
    "exceptions": {"sites": FIVE, "refusals": {"hospital-2": REASON}, "aborted": {1: "3 of 5 answered"}},
    "void": {"sites": FIVE, "overrides": ["privacy.insecure_seed=1"]},
    "no-claim": {"sites": FIVE, "overrides": ["privacy.unit='none'", "aggregation.kind='plain'"], "epsilon_step": None},
    "alone": {"sites": FIVE, "overrides": ["method.name='local'"], "epsilon_step": 0.0},
    "distributed": {"sites": FIVE, "overrides": SHARED},
    "client": {"sites": FIVE, "overrides": ["privacy.unit='client'", "privacy.noise='distributed'"]},
    "central": {"sites": FIVE, "overrides": ["privacy.unit='client'", "privacy.noise='central'"]},
    "private-figures": {
        "sites": FIVE,
        "overrides": [*SHARED, "evaluation.release='private'", "evaluation.patience=2", "evaluation.keep='best'"],
        "stopped_early": True,
        "kept_round": 3,
    },
    "public-cohort": {
        "sites": FIVE,
        "overrides": ["evaluation.release='public-cohort'", "evaluation.public_sites=['hospital-2', 'hospital-4']"],
    },
    "evil-names": {"sites": [EVIL, "病院 東京", "x" * 200, "$a_b$", "]]>"], "refusals": {EVIL: EVIL}, "uneven": True},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """case → its page."""
    root = tmp_path_factory.mktemp("runs")
    return {name: report.render(make_folder(root / name, **settings)) for name, settings in CASES.items()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short real run."""
    path = tmp_path_factory.mktemp("real") / "run"
    privfed.run(privfed.load_config(overrides=["rounds=2", "privacy.noise_multiplier=4"]), out=path)
    return path


@pytest.fixture
def run_of(tmp_path: Path) -> Callable[..., Path]:
    """overrides → the folder of a short real run."""

    def made(overrides: Sequence[str]) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        privfed.run(privfed.load_config(overrides=["rounds=1", "privacy.noise_multiplier=8", *overrides]), out=path)
        return path

    return made


class Outline(HTMLParser):
    """Checks nesting and collects what the tests ask about."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.svgs: list[dict[str, Any]] = []
        self.feed(page)
        self.close()
        assert self.stack == [], f"left open: {self.stack}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        attributes = dict(attrs)
        if tag == "svg":
            self.svgs.append({"attributes": attributes, "children": []})
        elif self.stack and self.stack[-1] == "svg":
            self.svgs[-1]["children"].append((tag, attributes))
        self.elements.append((tag, attributes))
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


# What the page is


@pytest.mark.parametrize("case", CASES)
def test_page_is_well_formed_and_accessible(pages: dict[str, str], case: str) -> None:
    outline = Outline(pages[case])
    tags = [tag for tag, _ in outline.elements]
    assert dict(outline.elements)["html"] == {"lang": "en"}
    levels = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in outline.elements if tag == "th")
    assert tags.count("table") == tags.count("caption")
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id stands twice"
    for _, attributes in outline.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        for name in ("href", "clip-path"):
            target = re.search(r"#([^)]+)", attributes.get(name) or "")
            assert target is None or target[1] in ids


@pytest.mark.parametrize("case", CASES)
def test_every_drawing_says_what_it_shows(pages: dict[str, str], case: str) -> None:
    svgs = Outline(pages[case]).svgs
    assert len(svgs) == {"nothing-measured": 0, "no-claim": 4, "alone": 4, "private-figures": 2}.get(case, 5)
    for svg in svgs:
        (title, title_attributes), (desc, desc_attributes) = svg["children"][:2]
        assert (title, desc) == ("title", "desc")
        assert svg["attributes"]["role"] == "img"
        assert svg["attributes"]["aria-labelledby"] == f"{title_attributes['id']} {desc_attributes['id']}"


@pytest.mark.parametrize("case", CASES)
def test_page_fetches_nothing_and_runs_nothing(pages: dict[str, str], case: str) -> None:
    page, outline = pages[case], Outline(pages[case])
    assert not re.search(r"(?i)https?:|//[a-z0-9-]+\.|@import|data:", page)
    assert not {"script", "link", "iframe", "object", "embed", "img", "form"} & {tag for tag, _ in outline.elements}
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    assert all((attributes.get("href") or "#").startswith("#") for _, attributes in outline.elements)
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    assert "nan" not in Outline(page).words.lower().split()


def test_drawings_take_their_colours_from_the_page(pages: dict[str, str]) -> None:
    page = pages["plain-run"]
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}", drawings)) == set()
    used = set(re.findall(r"var\((--[a-z-]+)\)", page))
    assert used <= set(re.findall(r"(--[a-z-]+):", page))


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_colours_have_contrast(pages: dict[str, str], scheme: str) -> None:
    blocks = re.findall(r":root \{(.*?)\}", pages["plain-run"], flags=re.DOTALL)
    colours = dict(re.findall(r"(--[a-z-]+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]))
    assert len(blocks) == 2
    for name in ("--ink", "--muted", "--accent", "--global", "--personal", "--local", "--epsilon", "--hurt"):
        for paper in ("--paper", "--card"):
            assert _contrast(colours[name], colours[paper]) >= 4.5, (name, paper)
    for kind in ("void", "warn", "note"):
        assert _contrast(colours[f"--{kind}-ink"], colours[f"--{kind}-paper"]) >= 4.5, kind


def test_same_folder_gives_same_page(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE, uneven=True)
    assert report.render(folder) == report.render(folder)


def test_settings_of_matplotlib_come_back(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    report.render(make_folder(tmp_path / "run", FIVE))
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules


def test_help_needs_neither_matplotlib_nor_jinja() -> None:
    code = "import sys, privfed.cli.app; print({'matplotlib', 'jinja2', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"


# What stands on the page


def test_epsilon_never_stands_alone(pages: dict[str, str]) -> None:
    words = Outline(pages["plain-run"]).words
    header = words[: words.index("How good the models are")]
    for part in ("ε = 2.205", "δ = 10⁻⁵", "one record", "against everybody", "PLD", "Poisson, rate 0.5", "σ/C = 3.5",
                 "one unit added or removed", "Simulated : one table cut into sites, not real hospitals"):  # fmt: skip
        assert part in header, part


def test_accuracy_is_labelled_not_dp(pages: dict[str, str]) -> None:
    other = {"private-figures": "released through noise, counted in ε", "public-cohort": "of the public sites alone"}
    for case in CASES:
        words = Outline(pages[case]).words
        assert words.count("internal, not DP") >= 3 or case in other
        assert case not in other or (other[case] in words and "internal, not DP" not in words)


def test_shared_noise_names_whom_it_holds_against(pages: dict[str, str]) -> None:
    """One line an adversary, each with its own ε, rounded up: 1.6, 1.8, 2.2041, 4.4."""
    words = Outline(pages["distributed"]).words
    assert "ε = 2.205 at δ = 10⁻⁵ for each record, against the server together with up to 2 colluding sites" in words
    assert "against everybody" not in words and "sees all that leaves a site" not in words
    assert "by its own site's noise" not in words and "Not stated" not in words
    for line in (
        "A curious server Each round, the sum of at least 4 of 5 sites' updates; no single one ε ≤ 1.600 for each",
        "The server and one site The sum without that site's own update ε ≤ 1.800 for each record, by all shares but",
        "those sites' shares of the noise ε ≤ 2.205 for each record, by all shares but theirs",
        "That site's update: under its own share of the noise ε ≤ 4.400 for each record, by the site's own share alone",
        "Another site The global model after each round ε ≤ 1.800",
        "under this site's own share of the noise ε ≤ 4.400",
        "Whoever gets the global model The final model ε ≤ 1.600",
        "leave its share of the noise out: then it counts as one that colludes",
    ):
        assert line in words, line
    assert "the ε above allows for 2" in words and "Noise in shares" in words and "with FedSGD across" in words


def test_client_unit_is_a_whole_site(pages: dict[str, str]) -> None:
    words = Outline(pages["client"]).words
    assert "for each whole site, against the server together with" in words and "a whole site (client)" in words
    assert "Unit one site, with everything that it sends" in words


def test_central_noise_trusts_the_server(pages: dict[str, str]) -> None:
    words = Outline(pages["central"]).words
    assert "against the other sites and whoever gets the model. It holds against nobody who runs the server" in words
    assert words.count("No bound: the server adds the noise") == 4  # curious, with one site, with holders, malicious
    assert "under the server's noise ε ≤ 2.205 for each whole site, by the server's noise" in words
    assert "Anything, from the server" in words and "against everybody but the trusted server" in words


def test_released_figures_stand_with_their_deviation(pages: dict[str, str]) -> None:
    words = Outline(pages["private-figures"]).words
    # Six rounds: 0.7 + 0.03 · 5
    assert "Global accuracy 0.850 ± 0.050 by the noise; in ε" in words
    assert "Global model: accuracy 0.850 ± 0.050 , after the last measured round" in words
    assert "noised counts of 6 rounds goes from 0.700 ± 0.050 to 0.850 ± 0.050" in words
    for absent in ("Worst decile", "Sites hurt", "Local-only", "Records tested", "not DP"):
        assert absent not in words, absent
    assert "Stopped early , after 6 of 6 rounds: the figure did not get better for 2 measurements in a row" in words
    assert "The model that was kept is that of round 4" in words
    assert "Figures of personal models: none stands on this page" in words


def test_public_cohort_shows_public_sites_alone(pages: dict[str, str]) -> None:
    outline = Outline(pages["public-cohort"])
    assert "exact, of the public sites alone (hospital-2, hospital-4)" in outline.words
    assert "Measured, without noise, by the public sites alone" in outline.words
    assert len(re.findall(r"▼ hurt −0\.\d{3}|▲ \+0\.\d{3}", outline.words)) == 2


def test_page_of_each_kind_of_noise_needs_no_other_words(run_of: Callable[..., Path]) -> None:
    """Real runs: every adversary of the table has its line, and the largest of those claimed is the run's ε."""
    for overrides in (
        [*SHARED, "evaluation.release='private'"],
        [*SHARED, "aggregation.kind='homomorphic'"],
        [*SHARED, "privacy.colluders=0"],
        ["evaluation.release='private'", "privacy.standardise_epsilon=0.5"],
        ["privacy.unit='client'", "privacy.noise='central'", "aggregation.kind='plain'"],
        ["privacy.unit='client'", "privacy.noise='central'", "evaluation.release='private'"],
    ):
        folder = run_of(overrides)
        summary = msgspec.json.decode((folder / "summary.json").read_bytes())["privacy"]
        words = Outline((folder / "report.html").read_text(encoding="utf-8")).words
        central = summary["noise"] == "central"
        assert ("Not stated" in words) == (central and summary["colluders"] is not None)
        covered = [
            line["epsilon"]
            for line in summary["adversaries"]
            if line["colluders"] <= (summary["colluders"] or 0)
            and not (line["adversary"] == "one other site" and summary["colluders"] == 0)
        ]
        assert (None in covered) == central
        assert max(value for value in covered if value is not None) <= summary["epsilon"]["max"] * (1 + 1e-9)


def test_void_run_says_so_at_every_epsilon(pages: dict[str, str]) -> None:
    words = Outline(pages["void"]).words
    assert "VOID The noise of this run comes from a fixed seed" in words
    assert "VOID, because the seed of the noise is known" in words
    assert "ε (void)" in words
    assert "Void: the seed of the noise is known" in words
    assert "by its own site's noise" not in words
    assert "VOID" not in Outline(pages["plain-run"]).words


def test_incomplete_run_names_refusals_and_aborts(pages: dict[str, str]) -> None:
    words = Outline(pages["refusal"]).words
    assert "INCOMPLETE 3 of 6 rounds were run, 1 of them ended with a sum" in words
    assert f"hospital-2 refused: {REASON}" in words
    assert "Round 2 released nothing: 3 of 5 answered" in words
    assert "INCOMPLETE" not in Outline(pages["plain-run"]).words


def test_complete_run_with_refusals_is_not_silent(pages: dict[str, str]) -> None:
    words = Outline(pages["exceptions"]).words
    assert "INCOMPLETE" not in words
    assert f"complete, with exceptions. hospital-2 refused: {REASON}" in words


def test_run_without_a_claim_shows_no_epsilon_figure(pages: dict[str, str]) -> None:
    words = Outline(pages["no-claim"]).words
    assert "NO PRIVACY CLAIM" in words and "ε = " not in words and "ε ≤" not in words
    assert "Every site's update, every round No claim" in words


def test_local_run_says_that_nothing_was_sent(pages: dict[str, str]) -> None:
    words = Outline(pages["alone"]).words
    assert "nothing sent" in words and "every site trained alone and sent no update" in words


def test_table_of_promises_follows_the_aggregation(pages: dict[str, str]) -> None:
    masked, plain = Outline(pages["plain-run"]).words, Outline(pages["no-claim"]).words
    # n = 5: threshold 4, minimum cohort 4, colluders 2 · 4 − 5 − 1 = 2
    assert "the sum of at least 4 of 5 sites' updates" in masked
    assert "The server and 4 or more holders of a site's shares That site's update" in masked
    assert "while no more than 2 of the sites collude" in masked
    assert "Every site's update, every round" in plain and "Single updates: plain aggregation" in plain


def test_promise_is_that_of_the_smallest_cohort(tmp_path: Path) -> None:
    words = Outline(report.render(make_folder(tmp_path / "run", FIVE, leaves="hospital-2"))).words
    # n = 4 after the first round: threshold 3, minimum cohort 3, colluders 2 · 3 − 4 − 1 = 1; one of the four drops out
    assert "the sum of at least 3 of 5 sites' updates" in words and "while no more than 1 of the sites collude" in words
    assert "later cohorts were smaller" in words and "Smallest sum that was released 3 sites" in words


def test_real_files_are_named_without_their_folders(tmp_path: Path) -> None:
    data = """data={source='csv', file='/some/place/heart.csv', site='s', label='y', classes={no=['0'], yes=['1']},
        numeric=[{name='age', range=[0, 100]}]}""".replace("\n", " ")
    words = Outline(report.render(make_folder(tmp_path / "run", FIVE, overrides=[data], simulated=False)))
    header = words.words[: words.words.index("How good the models are")]
    assert "5 real sites" in header and "Data heart.csv" in header and "Simulated" not in header


def test_hurt_sites_are_marked_in_words(pages: dict[str, str]) -> None:
    words = Outline(pages["plain-run"]).words
    marks = re.findall(r"▼ hurt −0\.\d{3}|▲ \+0\.\d{3}", words)
    assert len(marks) == 5
    hurt = sum("hurt" in mark for mark in marks)
    assert f"{100 * hurt / 5:.0f} % of sites have a personalised model worse than their own" in words
    assert f"{hurt} of 5 sites have a personalised model worse than their own local-only one" in words


def test_names_are_text_everywhere(pages: dict[str, str]) -> None:
    page = pages["evil-names"]
    assert "<script" not in page and "]]>" not in page
    assert page.count("&lt;script&gt;") >= 4  # table, banner, refusal, tooltips
    assert "病院 東京" in page


def test_many_sites_get_percentiles_and_a_scrolling_table(pages: dict[str, str]) -> None:
    page = pages["two-hundred"]
    assert page.count('<th scope="row">clinic-') == 200
    assert 'class="scroll tall"' in page and "the one that lost most first" in page
    gains = [float(text.replace("−", "-")) for text in re.findall(r"(?:▼ hurt |▲ )([+−]0\.\d{3})", page)]
    assert len(gains) > 190 and gains == sorted(gains)
    assert "middle 80 % of sites" in page
    assert len(page) < 400_000


def test_figures_are_those_of_the_folder(run_folder: Path) -> None:
    summary = msgspec.json.decode((run_folder / "summary.json").read_bytes())
    words = Outline(report.render(run_folder)).words
    assert f"Personalised accuracy {summary['utility']['personalized']['mean']:.3f}" in words
    assert f"ε = {epsilon_text(summary['privacy']['epsilon']['max'])}" in words
    assert f"Run {summary['run']}. Page by privfed {privfed.__version__}." in words
    assert "hospital-5" in words


def test_sites_held_out_of_training_have_their_own_table(run_of: Callable[..., Path]) -> None:
    folder = run_of(["evaluation.unseen_sites=['hospital-2']", "evaluation.unseen_records=12"])
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    page = report.render(folder)
    words = Outline(page).words
    own = line["unseen"]["hospital-2"]
    figures = " ".join(f"{own[key]:.3f}" for key in ("global_score", "personalized", "local_only"))
    assert f"hospital-2 {own['records']} {figures}" in words
    assert "1 site was held out" in words and "of which it used 12" in words
    assert "took no part" not in Outline(report.render(run_of([]))).words


def test_run_leaves_its_page(run_folder: Path) -> None:
    assert (run_folder / "report.html").read_text(encoding="utf-8") == report.render(run_folder)


def test_instructions_to_verify_work(run_folder: Path) -> None:
    match = re.search(r'<pre id="verify"><code>(.*?)</code>', report.render(run_folder), flags=re.DOTALL)
    assert match is not None
    script = html.unescape(match[1]).replace("python -", f"{sys.executable} -", 1)
    done = subprocess.run(["bash", "-c", script], cwd=run_folder, capture_output=True, text=True, check=True)
    summary = msgspec.json.decode((run_folder / "summary.json").read_bytes())
    sites = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert sites == pytest.approx(summary["privacy"]["epsilon"]["per_site"], rel=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "text"), [(3.9914677, "3.992"), (4.0, "4.000"), (0.0, "0.000"), (12.345001, "12.346")]
)
def test_epsilon_is_rounded_up(epsilon: float, text: str) -> None:
    assert epsilon_text(epsilon) == text


def test_delta_reads_as_a_power() -> None:
    assert [delta_text(d) for d in (1e-5, 2.5e-6, 0.001)] == ["10⁻⁵", "2.5 × 10⁻⁶", "10⁻³"]


# The folder


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"nowhere is not a run's folder: it has no config\.toml"):
        report.render(tmp_path / "nowhere")


def test_unfinished_run_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    (folder / "summary.json").unlink()
    with pytest.raises(RunFolderError, match="the run has not ended"):
        report.render(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"run": 1}', '{"run": "x"}'])
def test_damaged_summary_is_named(tmp_path: Path, text: str) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    (folder / "summary.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"summary\.json is not the summary of a run"):
        report.render(folder)


def test_damaged_round_is_named_by_its_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join([*lines[:2], "{broken\n", *lines[3:]]))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 3,"):
        report.render(folder)


def test_last_round_cut_short_is_left_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    whole = report.render(folder)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"round": 6, "invi')
    assert report.render(folder) == whole


def test_configuration_of_another_version_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    (folder / "config.toml").write_text("flux = 3\n")
    with pytest.raises(ConfigError, match=r"config\.toml is not a configuration of this version.*flux"):
        report.render(folder)


# The command


def test_command_makes_the_page_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    shown = CliRunner().invoke(app, ["report", str(folder)])
    assert (shown.exit_code, shown.output) == (0, f"report: {folder / 'report.html'}\n")
    assert (folder / "report.html").read_text(encoding="utf-8") == report.render(folder)
    assert not list(folder.glob("*.new"))


def test_command_writes_where_it_is_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", FIVE)
    CliRunner().invoke(app, ["report", str(folder), "--out", str(tmp_path / "page.html")], catch_exceptions=False)
    assert (tmp_path / "page.html").is_file() and not (folder / "report.html").exists()


@pytest.mark.parametrize(
    "arguments", [["report", "nowhere"], ["report", "run", "--out", "no/such/page.html"], ["report"]]
)
def test_command_ends_errors_with_what_to_do(tmp_path: Path, arguments: list[str]) -> None:
    make_folder(tmp_path / "run", FIVE)
    done = subprocess.run(
        [sys.executable, "-c", "from privfed.cli import main; main()", *arguments],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("privfed: ") and "Traceback" not in done.stderr


# In a browser


@pytest.fixture
def shoot(tmp_path: Path) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt-get install chromium")

    def shot(page: str, *, width: int, dark: bool) -> np.ndarray:
        """uint8[height, width, 3]: what headless Chromium shows; any error on its console fails the test."""
        from PIL import Image

        (tmp_path / "page.html").write_text(page, encoding="utf-8")
        picture = tmp_path / f"{width}-{dark}.png"
        done = subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                "--enable-logging=stderr", f"--user-data-dir={tmp_path / f'profile-{width}-{dark}'}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},3000",
                f"--screenshot={picture}", (tmp_path / "page.html").as_uri(),
            ],
            capture_output=True, text=True, check=True, timeout=600,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        assert console == []
        with Image.open(picture) as image:
            return np.asarray(image.convert("RGB"))

    yield shot


@pytest.mark.parametrize("width", [1200, 400])
def test_browser_shows_the_page_in_light_and_dark(pages: dict[str, str], shoot: Any, width: int) -> None:
    for case in ("plain-run", "evil-names"):
        light, dark = (shoot(pages[case], width=width, dark=scheme) for scheme in (False, True))
        assert light.shape[1] == width
        assert tuple(light[0, 0]) == (0xFF, 0xFF, 0xFF) and tuple(dark[0, 0]) == (0x14, 0x18, 0x1D)
        assert light.mean() > 200 > 80 > dark.mean()
        for name, colour in (("--global", (0x1F, 0x5F, 0xA8)), ("--personal", (0x0B, 0x6E, 0x52))):
            assert (np.abs(light.astype(int) - colour).sum(2) < 12).sum() > 100, f"{name} is not drawn"
