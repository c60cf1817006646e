"""What is audited: a run that was made, or a configuration that could be run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from privfed.privacy.events import Charge, PrivacyUnit

from .. import api, config_io, folder
from ..cohort import Cohort, cohort_of
from ..config import Config
from ..errors import ConfigError
from ..folder import RunFolder

Progress = Callable[[int, int, int], None]
"""``progress(level, done, total)``: units of work, for a bar."""


@dataclass(frozen=True)
class Target:
    """A checked configuration, its noise, and the run that was made with it.

    Attributes:
        ready: configuration, data, schema and noise.
        home: the run's folder; None for a configuration.
    """

    ready: api.Preparation
    home: RunFolder | None = field(default=None)

    @property
    def config(self) -> Config:
        return self.ready.config

    @property
    def noise_multiplier(self) -> float:
        return self.ready.noise_multiplier

    @property
    def cohort(self) -> Cohort:
        return cohort_of(self.config, len(self.ready.training))

    @property
    def name(self) -> str:
        return self.home.facts().run if self.home is not None else self.config.name

    @property
    def finished(self) -> bool:
        return self.home is not None and (self.home.path / folder.PERSONAL).is_file()

    def cost(self, charges: tuple[Charge, ...]) -> float:
        """ε of ``charges`` at the run's δ."""
        return self.ready.accountant.epsilon(charges, self.config.privacy.delta).value

    def require_claim(self, level: int) -> None:
        """Return if there is a claim that levels 1 to 3 can attack.

        Raises:
            ConfigError: the run claims nothing, or sends nothing.
        """
        if not self.config.method.sends:
            raise ConfigError(
                f"level {level} attacks what leaves a site, and this run's method sends nothing: others learn nothing. "
                "Use --level 4, which attacks the personal models of a finished run"
            )
        if self.config.privacy.unit is PrivacyUnit.NONE:
            raise ConfigError(
                f"level {level} attacks a claim, and privacy.unit = 'none' makes none. Use --level 4, which attacks "
                "the personal models of a finished run"
            )


def target_of(source: Path | str | None = None) -> Target:
    """A run's folder, a TOML file, or the main job.

    Raises:
        RunFolderError, ConfigError, DataError: it can not be read, or is not what it was.
    """
    path = Path(source) if source is not None else None
    if path is None or not path.is_dir():
        return Target(api.prepare(config_io.load_config(path)))
    home = RunFolder.open(path)
    return Target(api.prepare_resumed(path), home)
