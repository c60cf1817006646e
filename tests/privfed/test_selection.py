"""Choices among rounds: on figures that may leave, or not at all."""

from typing import Any

import pytest

from privfed import wire
from privfed.errors import ConfigError
from privfed.federation import RoundReport
from privfed.figures import Released
from privfed.privacy.events import PrivacyUnit
from privfed.selection import best, check_selection, figure, stalled

from .house import changed, config


def report(number: int, score: float | None = None, *, exact: tuple[float | None, ...] = ()) -> RoundReport:
    """A round with a released score, or with exact figures of some sites."""
    measured = {f"site {index}": wire.Measurement(10, 0.5, value, 0.9, 0.9, None) for index, value in enumerate(exact)}
    return RoundReport(
        round=number,
        invited=("a",),
        contributed=("a",),
        dropped={},
        refused={},
        aborted=None,
        bytes_up=0.0,
        measurements=measured,
        released=None if score is None and exact else Released(score, None),
        seconds=0.0,
    )


def rounds(*scores: float | None) -> list[RoundReport]:
    return [report(number, score) for number, score in enumerate(scores)]


def test_a_rounds_figure_is_the_released_one_or_the_mean_of_what_sites_show() -> None:
    assert figure(report(0, 0.75)) == 0.75
    assert figure(report(0, exact=(0.5, None, 1.0))) == 0.75
    assert figure(report(0, exact=(None, None))) is None
    assert figure(report(0, None)) is None


@pytest.mark.parametrize(
    ("scores", "number"),
    [
        ((0.5, 0.9, 0.7), 1),
        ((0.9, 0.9, 0.7), 0),  # the first of equals
        ((None, 0.2, None), 1),
        ((None, None), None),
        ((), None),
        ((0.0,), 0),
    ],
)
def test_the_best_round_has_the_highest_figure(scores: tuple[float | None, ...], number: int | None) -> None:
    assert best(rounds(*scores), "accuracy") == number


@pytest.mark.parametrize(
    ("scores", "patience", "ends"),
    [
        ((0.5, 0.6, 0.6, 0.5), 2, True),
        ((0.5, 0.6, 0.61, 0.5), 2, False),
        ((0.6, 0.5), 2, False),  # two without a better one need one before them
        ((0.6, 0.5, 0.5), 2, True),
        ((0.6, None, 0.5, None, 0.5), 2, True),  # rounds without a figure do not count
        ((0.6, None, None, None), 2, False),
        ((0.6, 0.5, 0.4, 0.3), None, False),
        ((), 1, False),
    ],
)
def test_a_run_has_stalled_when_the_last_figures_bring_nothing_better(
    scores: tuple[float | None, ...], patience: int | None, ends: bool
) -> None:
    assert stalled(rounds(*scores), "accuracy", patience) is ends


@pytest.mark.parametrize("choice", [{"patience": 2}, {"keep": "best"}])
def test_internal_figures_choose_nothing_under_a_claim(choice: dict[str, Any]) -> None:
    chosen = changed(config(), "evaluation", **choice)
    with pytest.raises(ConfigError, match="covered by no"):
        check_selection(chosen)
    check_selection(changed(chosen, "privacy", unit=PrivacyUnit.NONE))
    check_selection(changed(chosen, "evaluation", release="private"))
    check_selection(changed(chosen, "evaluation", release="public-cohort", public_sites=("a",)))
    check_selection(config())


def test_a_public_cohort_has_sites() -> None:
    with pytest.raises(ConfigError, match="public_sites"):
        check_selection(changed(config(), "evaluation", release="public-cohort"))
