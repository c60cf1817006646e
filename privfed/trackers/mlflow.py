"""A run on an MLflow tracking server."""

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from privfed.errors import ConfigError, PrivfedError
from privfed.watching import Row, View, Watcher

from .figures import epsilon_is, facts, figures, identity

TAG = "privfed.run"
_MARK = "seconds"  # every round has it: where it stands, the round does
_MOST_METRICS = 1000  # in one request: MLflow's own limit
_SCHEMES = ("http", "https", "file", "sqlite")


class TrackingError(PrivfedError):
    """The tracking server does not take the run."""


class Tracker:
    """One tracking server.

    Args:
        uri: of the server; http, https, file or sqlite.
        experiment: its name there; default the run's configured name.

    Guarantees:
        What is sent goes to ``uri``: MLflow's telemetry is off. Neither the user's name nor the machine's is sent.

    Raises:
        ConfigError: MLflow is not installed, or the address is none of these.
    """

    def __init__(self, uri: str, experiment: str | None = None) -> None:
        if urlsplit(uri).scheme not in _SCHEMES:
            raise ConfigError(f"--tracking-uri must begin with one of {', '.join(s + ':' for s in _SCHEMES)}")
        os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")  # read when it is imported
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ConfigError(f"MLflow is not here ({error}): pip install -c constraints.txt '.[mlflow]'") from None
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
        except (MlflowException, ImportError):  # files are opted into, databases need all of MLflow
            raise ConfigError(
                "this MLflow does not open that address by itself: give the one of a tracking server, http: or https:"
            ) from None
        self._experiment = experiment
        self._run = ""

    def write(self, watcher: Watcher, view: View) -> str:
        """Bring the run up to date there: rounds that it has are not sent again. Its id there.

        Args:
            watcher: has looked at the run, and seen ``view``.

        Raises:
            TrackingError: the server does not answer, or refuses.
            RunFolderError: there is no run yet.
        """
        from mlflow.exceptions import MlflowException

        run, began = identity(watcher)
        try:
            return self._write(watcher, view, run, began)
        except MlflowException as error:  # its text may hold an address with a password in it
            raise TrackingError(
                f"the tracking server does not take the run ({error.error_code}), or nothing answers there: is the "
                "address right, and is it up (mlflow server --port 5000)? What it has stays; give the command again"
            ) from None

    def _write(self, watcher: Watcher, view: View, run: str, began: float) -> str:
        assert watcher.config is not None
        self._run = self._run or self._found(watcher, run, began, self._experiment or watcher.config.name)
        held = {metric.step for metric in self._client.get_metric_history(self._run, _MARK)}
        new = [row for row in watcher.rows if row.round + 1 not in held]
        for batch in self._batches(watcher, new, began):
            self._client.log_batch(self._run, metrics=batch)
        self._client.set_tag(self._run, "epsilon_is", epsilon_is(watcher))
        ended = int(1000 * (began + sum(row.seconds for row in watcher.rows)))
        if view.state == "over" and watcher.summary is not None:
            status = "FINISHED" if watcher.summary.complete else "FAILED"
            self._client.set_terminated(self._run, status=status, end_time=ended)
        elif self._client.get_run(self._run).info.status != "RUNNING":
            self._client.update_run(self._run, status="RUNNING")
        return self._run

    def _found(self, watcher: Watcher, run: str, began: float, experiment: str) -> str:
        """The run there, by the tag that it was made with; made if there is none."""
        from mlflow.entities import Param

        known = self._client.get_experiment_by_name(experiment)
        number = known.experiment_id if known else self._client.create_experiment(experiment)
        there = self._client.search_runs([number], filter_string=f"tags.`{TAG}` = '{run}'", max_results=1)
        if there:
            return str(there[0].info.run_id)
        made = self._client.create_run(number, start_time=int(1000 * began), tags={TAG: run}, run_name=run)
        params = [Param(key, value) for key, value in facts(watcher).items() if value]
        self._client.log_batch(made.info.run_id, params=params)
        return str(made.info.run_id)

    def _batches(self, watcher: Watcher, rows: list[Row], began: float) -> Iterator[list[Any]]:
        """Metrics of whole rounds, as many as one request may hold."""
        from mlflow.entities import Metric

        ends, now = {}, began
        for row in watcher.rows:
            now += row.seconds
            ends[row.round] = int(1000 * now)
        batch: list[Any] = []
        for row in rows:
            metrics = [
                Metric(name, value, ends[row.round], row.round + 1) for name, value in figures(watcher, row).items()
            ]
            if len(batch) + len(metrics) > _MOST_METRICS:
                yield batch
                batch = []
            batch += metrics
        if batch:
            yield batch
