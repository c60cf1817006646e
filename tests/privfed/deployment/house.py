"""A consortium of three hospitals in folders, with everything but FLARE: its certificates and kits are left away."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pandas as pd
from sklearn.datasets import load_breast_cancer

from privfed import config_io
from privfed.config import Config, Policy
from privfed.deployment import kits, papers
from privfed.deployment.consortium import Consortium
from privfed.deployment.durable import DurableSite
from privfed.deployment.files import write_toml
from privfed.deployment.hospital import SITE, Hospital, Strict, Study

SITES = ("north", "south", "west")
SEED = 7
OPEN = msgspec.structs.replace(Strict, release_figures=True, key_holders=None)


def tables(folder: Path, sites: Sequence[str] = SITES) -> dict[str, str]:
    """Hospitals' tables: public records, cut in parts."""
    raw = load_breast_cancer()
    frame = pd.DataFrame(
        raw.data[:, :6], columns=["radius", "texture", "perimeter", "area", "smoothness", "compactness"]
    )
    frame["label"] = raw.target
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for number, site in enumerate(sites):
        paths[site] = str(folder / f"{site}.csv")
        frame.iloc[number :: len(sites)].head(120).to_csv(paths[site], index=False)
    return paths


def experiment(paths: dict[str, str], **more: Any) -> Config:
    """An experiment over them; as a user's file has it."""
    ranges = {
        "radius": [5, 30],
        "texture": [5, 40],
        "perimeter": [40, 190],
        "area": [100, 2600],
        "smoothness": [0.05, 0.17],
        "compactness": [0.01, 0.4],
    }
    table: dict[str, Any] = {
        "name": "pilot",
        "rounds": 3,
        "data": {
            "source": "csv",
            "files": paths,
            "label": "label",
            "classes": {"benign": ["1"], "malignant": ["0"]},
            "numeric": [{"name": name, "range": low_high} for name, low_high in ranges.items()],
        },
        "privacy": {"delta": 1e-5, "target_epsilon": 3.0},
        "simulation": {"deadline_seconds": 30},
        "evaluation": {"local_steps": 5},
    }
    for key, value in more.items():
        table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
    return config_io.decode(table)


@contextmanager
def without_flare() -> Iterator[None]:
    """FLARE's part of a folder, left away: certificates, kits and their settings."""

    def nothing(*_: object, **__: object) -> None:
        pass

    def a_file(folder: Path, *_: object, **__: object) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "flare.request.zip"
        path.write_bytes(b"a request for a certificate")
        return path

    def a_kit(*_: object, out: Path, **__: object) -> Path:
        (out / "local").mkdir(parents=True)
        (out / "startup").mkdir()
        return out

    def signed(_: Path, asked: Path, path: Path) -> Path:
        path.write_bytes(b"a certificate")
        return path

    with ExitStack() as stack:
        for name, stand_in in {
            "require_flare": nothing,
            "own_kits": nothing,
            "harden": nothing,
            "require_site": nothing,
            "request": a_file,
            "package": a_kit,
            "approve": signed,
            "new_authority": lambda *_: "SHA256:00",
        }.items():
            stack.enter_context(mock.patch.object(kits, name, stand_in))
        yield


def found(
    home: Path,
    config: Config,
    *,
    port: int = 8102,
    policy: Policy = OPEN,
    study: bool = True,
    engine: papers.EngineName = "nvflare",
) -> Consortium:
    """A consortium, its hospitals beside it, all set up."""
    sites: dict[str, str] = config.data.files  # type: ignore[union-attr]
    consortium = Consortium.create(
        home / "coordinator",
        config,
        name="consortium",
        contact="c@example.org",
        host="localhost",
        port=port,
        engine=engine,
    )
    for site in sites:
        body = Hospital.request(
            home / site,
            consortium="consortium",
            name=site,
            organisation=f"{site}-hospital",
            contact=f"it@{site}.org",
            engine=engine,
        )
        consortium.approve(body)
    consortium.next_roster()
    for site in sites:
        hospital = Hospital.open(home / site)
        hospital.install(
            consortium.kit(site),
            authority=consortium.terms.authority,
            data=Path(sites[site]),
            policy=policy,
        )
        if study:
            file = msgspec.structs.replace(Hospital.open(home / site).file, study=Study(insecure_seed=SEED))
            write_toml(home / site / SITE, file, comment="reproducible")
    return consortium


@contextmanager
def at_work(home: Path) -> Iterator[dict[str, DurableSite]]:
    with ExitStack() as stack:
        yield {site: stack.enter_context(Hospital.open(home / site).opened()) for site in SITES}


def hospital(consortium: Consortium, name: str = "north") -> Hospital:
    """A site of `found`, opened anew."""
    return Hospital.open(consortium.home.parent / name)


__all__ = ["SEED", "SITES", "at_work", "experiment", "found", "hospital", "papers", "tables", "without_flare"]
