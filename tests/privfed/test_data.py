"""The keyed split, the simulated sites, the fingerprint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privfed.config import Evaluation
from privfed.data.partition import skewed_sites
from privfed.data.records import SiteData, keyed_fraction, public_split_key
from privfed.data.sources import BreastCancer
from privfed.methods import Fomaml
from privfed.privacy.oracle.door import ALL

from .house import House, config, records

IDS = st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=30)


def fractions(ids: list[int], seed: int = 3, label: str = "test") -> list[float]:
    return keyed_fraction(np.array(ids, dtype=np.uint64), key=public_split_key(seed), label=label).tolist()


@given(IDS, st.integers(0, 2**64 - 1))
def test_one_more_record_moves_no_other(ids: list[int], newcomer: int) -> None:
    before = dict(zip(ids, fractions(ids), strict=True))
    mixed = [newcomer, *reversed(ids)]
    after = dict(zip(mixed, fractions(mixed), strict=True))
    assert all(after[record] == place for record, place in before.items() if record != newcomer)


def test_fractions_are_uniform_and_change_with_seed_and_purpose() -> None:
    ids = list(range(4000))
    places = fractions(ids)
    assert stats.kstest(places, "uniform").pvalue > 1e-4
    for other in (fractions(ids, seed=4), fractions(ids, label="parts")):
        # independent columns of 4000: |r| < 5/√4000 but for a chance of 6e-7
        assert abs(np.corrcoef(places, other)[0, 1]) < 5 / 4000**0.5


@pytest.mark.parametrize("n", [0, 1, 200])
def test_test_and_training_records_and_their_parts_cover_every_record_once(tmp_path: Path, n: int) -> None:
    house = House(tmp_path)
    data = records(1, n)
    settings = config(method=Fomaml(), evaluation=Evaluation(test_fraction=0.3, local_steps=1))
    split = house.start("a", data=data)._split_of(settings)
    assert sorted([*split.train.ids.tolist(), *split.test.ids.tolist()]) == sorted(data.ids.tolist())
    rows = {name: set(part.tolist()) for name, part in split.parts.items()}
    assert rows["support"] | rows["query"] == rows[ALL] == set(range(len(split.train)))
    assert not rows["support"] & rows["query"]
    if n == 200:
        # Binomial(200, .3) within 4 sd of 6.5
        assert abs(len(split.test) - 60) < 26
        assert len(rows["support"]) > 0 < len(rows["query"])
    # rows stay together
    by_id = dict(zip(data.ids.tolist(), data.inputs.tolist(), strict=True))
    assert all(by_id[i] == row for i, row in zip(split.test.ids.tolist(), split.test.inputs.tolist(), strict=True))


def test_the_test_split_is_independent_of_the_parts(tmp_path: Path) -> None:
    """One hash for both would put all of one part among the test records."""
    split = House(tmp_path).start("a", data=records(2, 1000))._split_of(config(method=Fomaml()))
    # Binomial(≈ 750, ½): 4 sd = 55
    assert abs(len(split.parts["support"]) - len(split.train) / 2) < 60


def test_the_simulated_hospitals_hold_the_whole_table_once() -> None:
    sites = BreastCancer().load(seed=0).sites
    ids = [record for data in sites.values() for record in data.ids.tolist()]
    assert sorted(ids) == list(range(569))
    sizes = [len(data) for data in sites.values()]
    assert sizes[0] > 1.5 * sizes[-1]
    rates = [float(data.targets.double().mean()) for data in sites.values()]
    assert rates[-1] > rates[0]
    for data in sites.values():
        assert data.inputs.dtype == torch.float32 and data.targets.dtype == torch.int64
        # 4 (x − typical) / (high − low) with typical a quarter up: from −1 to 3
        assert -1.0 <= float(data.inputs.min()) and float(data.inputs.max()) <= 3.0
        assert set(data.targets.tolist()) <= {0, 1}


def test_simulated_sites_come_from_the_public_seed() -> None:
    first, again, other = (BreastCancer(sites=7).load(seed=seed).sites for seed in (1, 1, 2))
    assert all(torch.equal(first[name].inputs, again[name].inputs) for name in first)
    assert not all(len(first[name]) == len(other[name]) for name in first)


@given(st.integers(1, 12), st.floats(1, 100), st.integers(0, 2**32))
def test_a_partition_gives_every_record_a_site(sites: int, skew: float, seed: int) -> None:
    labels = np.arange(50) % 2
    site = skewed_sites(labels, sites, skew=skew, seed=seed)
    assert site.shape == labels.shape
    assert 0 <= site.min() and site.max() < sites


def test_a_fingerprint_names_the_records_and_needs_the_key() -> None:
    data = records(1, 6)
    key = bytes(32)
    name = data.fingerprint(key)
    assert name == records(1, 6).fingerprint(key) and len(name) == 64
    moved = data.inputs.clone()
    moved[0, 0] += 1e-6
    flipped = data.targets.clone()
    flipped[0] = 1 - flipped[0]
    others = [
        data.fingerprint(bytes([1]) * 32),
        SiteData(data.ids, moved, data.targets).fingerprint(key),
        SiteData(data.ids, data.inputs, flipped).fingerprint(key),
        SiteData(data.ids + np.uint64(1), data.inputs, data.targets).fingerprint(key),
        data.rows(np.arange(6) < 5).fingerprint(key),
    ]
    assert len({name, *others}) == 6


def test_records_do_not_show_in_a_repr() -> None:
    assert repr(records(1)) == "SiteData()"
