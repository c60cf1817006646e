"""TensorBoard's files and MLflow's runs: what they hold, that twice is once, and that nothing else leaves."""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from typer.testing import CliRunner

from privfed import folder
from privfed.cli.app import app
from privfed.cli.exits import exit_code
from privfed.config_io import load_config
from privfed.errors import ConfigError, RunFolderError
from privfed.report.standing import meaning
from privfed.trackers import tensorboard
from privfed.trackers.figures import figures
from privfed.trackers.mlflow import Tracker, TrackingError
from privfed.watching import Watcher
from tests.privfed.watched import stand_at, watched

SITES = ("north", "south", "west")


def looked(home: Path) -> Watcher:
    watcher = Watcher(home)
    watcher.look()
    return watcher


# What is given


def test_what_trackers_get_has_no_site_no_path_and_no_record(tmp_path: Path) -> None:
    watcher = looked(watched(tmp_path / "run", SITES, over=False))
    given = figures(watcher, watcher.rows[1])
    assert set(given) == {
        "loss", "global", "personalized", "epsilon_max", "noise_multiplier", "sites_invited", "sites_contributed",
        "faults", "bytes_up_per_site", "seconds",
    }  # fmt: skip
    row = watcher.rows[1]
    assert given["global"] == row.score and given["epsilon_max"] == row.epsilon and given["sites_contributed"] == 3


def test_a_void_epsilon_has_another_name(tmp_path: Path) -> None:
    watcher = looked(watched(tmp_path / "run", SITES, overrides=["privacy.insecure_seed=1"], over=False))
    assert "epsilon_max_VOID" in (given := figures(watcher, watcher.rows[0])) and "epsilon_max" not in given
    assert watcher.config is not None and meaning(watcher.config, watcher.rows, None).startswith("VOID: ")


def test_what_epsilon_is_of_is_said_with_its_company() -> None:
    config = load_config()
    assert meaning(config, [], None) == (
        "ε at δ = 10⁻⁵ for each record, local noise, records by Poisson sampling, rate 0.5, adding or removing one, "
        "each site's accountant, against whoever sees all that leaves a site; the largest of any site, all its runs "
        "together."
    )
    assert meaning(load_config(overrides=['privacy.unit="none"']), [], None) == ""


@pytest.mark.parametrize("run", ["../../outside", "a' OR 'b", ""])
def test_a_run_whose_id_is_none_is_refused(tmp_path: Path, run: str) -> None:
    home = watched(tmp_path / "run", SITES)
    facts = json.loads((home / folder.RUN).read_text())
    (home / folder.RUN).write_text(json.dumps(facts | {"run": run}))
    with pytest.raises(RunFolderError, match="names its run"):
        tensorboard.write(looked(home), tmp_path / "logs")
    assert not (tmp_path / "logs").exists()


# TensorBoard


def events(path: Path) -> dict[str, list[tuple[int, float, float]]]:
    """tag → (step, wall time, value), as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    read = EventAccumulator(str(path.parent))
    read.Reload()
    tags = read.Tags()
    found = {tag: [(one.step, one.wall_time, one.value) for one in read.Scalars(tag)] for tag in tags["scalars"]}
    for tag in tags["tensors"]:  # as newer versions hold scalars
        found[tag] = [(e.step, e.wall_time, float(tensor_util.make_ndarray(e.tensor_proto))) for e in read.Tensors(tag)]
    return found


@pytest.fixture
def board() -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not here: pip install 'privfed[tensorboard]'")


def test_tensorboard_reads_what_the_run_says(tmp_path: Path, board: None) -> None:
    home = watched(tmp_path / "run", SITES, aborted={4: "few"})
    watcher = looked(home)
    path = tensorboard.write(watcher, tmp_path / "logs")
    assert path == tmp_path / "logs" / "made" / "events.out.tfevents.privfed"
    found = events(path)
    assert set(found) == set(figures(watcher, watcher.rows[0]))
    assert [step for step, _, _ in found["epsilon_max"]] == [1, 2, 3, 4, 5, 6]
    for tag in ("global", "epsilon_max", "loss"):  # float32 holds 24 bits
        expected = [figures(watcher, row)[tag] for row in watcher.rows]
        assert [value for _, _, value in found[tag]] == pytest.approx(expected, rel=1e-6)
    assert [value for _, _, value in found["faults"]] == [0, 0, 0, 0, 1, 0]
    times = [time for _, time, _ in found["global"]]
    assert [b - a for a, b in pairwise(times)] == pytest.approx([0.25] * 5, abs=1e-6)
    text = path.read_bytes()
    assert "ε at δ = 10⁻⁵ for each record".encode() in text
    assert not any(name.encode() in text for name in (*SITES, str(tmp_path), os.uname().nodename))


def test_twice_is_once_and_further_rounds_are_appended(tmp_path: Path, board: None) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    stand_at(home, 2)
    path = tensorboard.write(looked(home), tmp_path / "logs")
    first = path.read_bytes()
    tensorboard.write(looked(home), tmp_path / "logs")
    assert path.read_bytes() == first
    number = path.stat().st_ino
    stand_at(home, 5)
    tensorboard.write(looked(home), tmp_path / "logs")
    assert path.read_bytes().startswith(first) and path.stat().st_ino == number  # who has it open goes on reading
    assert [step for step, _, _ in events(path)["global"]] == [1, 2, 3, 4, 5]


def test_a_file_that_is_not_a_beginning_of_the_run_is_replaced(tmp_path: Path, board: None) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    path = tensorboard.write(looked(home), tmp_path / "logs")
    whole = path.read_bytes()
    for wrong in (whole[:-3] + b"xyz", whole + whole[-20:], b"nothing"):
        path.write_bytes(wrong)
        tensorboard.write(looked(home), tmp_path / "logs")
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-7])  # cut short by a kill
    tensorboard.write(looked(home), tmp_path / "logs")
    assert path.read_bytes() == whole


def test_the_command_follows_to_the_end(tmp_path: Path, board: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("privfed.cli.export.LOOK_SECONDS", 0.0)
    home = watched(tmp_path / "run", SITES)
    for options in ([], ["--follow"]):
        done = CliRunner().invoke(app, ["export", "tensorboard", str(home), str(tmp_path / "logs"), *options])
        assert done.exit_code == 0 and "6 rounds" in done.stdout
    none = CliRunner().invoke(app, ["export", "tensorboard", str(tmp_path / "nothing"), str(tmp_path / "logs")])
    assert isinstance(none.exception, RunFolderError) and "there is no run" in str(none.exception)


# MLflow


class Server:
    """As much of MLflow's REST interface as a tracker may use; it keeps every request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.refuses = ""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _answer(self) -> None:
                text = self.rfile.read(int(self.headers.get("content-length") or 0))
                place = urlsplit(self.path)
                body = json.loads(text) if text else {key: one[0] for key, one in parse_qs(place.query).items()}
                status, answer = outer.answer(place.path, body)
                content = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = _answer  # noqa: N815  # names of http.server

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever)
        self._thread.start()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.requests.append((path, body))
        what = path.partition("/mlflow/")[2]
        run = self.runs.get(body.get("run_id", ""))
        if self.refuses and self.refuses in body.values():
            return 403, {"error_code": "PERMISSION_DENIED", "message": "secret words"}
        match what:
            case "experiments/get-by-name":
                if (name := body["experiment_name"]) in self.experiments:
                    return 200, {"experiment": {"experiment_id": self.experiments[name], "name": name}}
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
            case "experiments/create":
                self.experiments[body["name"]] = str(len(self.experiments) + 1)
                return 200, {"experiment_id": self.experiments[body["name"]]}
            case "runs/create":
                number = f"r{len(self.runs)}"
                self.runs[number] = {"status": "RUNNING", "metrics": [], "params": {}, "tags": {}}
                self.runs[number]["tags"] |= {tag["key"]: tag["value"] for tag in body["tags"]}
                return 200, {"run": self._told(number)}
            case "runs/search":
                name = body["filter"].partition("= '")[2][:-1]
                found = [key for key, one in self.runs.items() if one["tags"].get("privfed.run") == name]
                return 200, {"runs": [self._told(key) for key in found]}
            case "runs/get" if run is not None:
                return 200, {"run": self._told(body["run_id"])}
            case "runs/log-batch" if run is not None:
                run["metrics"] += body.get("metrics", [])
                run["params"] |= {one["key"]: one["value"] for one in body.get("params", [])}
                return 200, {}
            case "runs/set-tag" if run is not None:
                run["tags"][body["key"]] = body["value"]
                return 200, {}
            case "runs/update" if run is not None:
                run["status"] = body.get("status", run["status"])
                return 200, {"run_info": self._told(body["run_id"])["info"]}
            case "metrics/get-history" if run is not None:
                return 200, {"metrics": [one for one in run["metrics"] if one["key"] == body["metric_key"]]}
        return 500, {"error_code": "INTERNAL_ERROR", "message": "unknown"}

    def _told(self, number: str) -> dict[str, Any]:
        run = self.runs[number]
        tags = [{"key": key, "value": value} for key, value in run["tags"].items()]
        info = {"run_id": number, "run_uuid": number, "experiment_id": "1", "status": run["status"], "start_time": 1}
        return {"info": info, "data": {"tags": tags}}


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("mlflow", reason="MLflow is not here: pip install 'privfed[mlflow]'")
    made = Server()
    yield made
    made.close()


_ALONE = """
import json, socket, sys
reached = []
def hook(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        reached.append(str(arguments[1][0] if event == "socket.connect" else arguments[0]))
        if reached[-1] != "127.0.0.1":
            raise OSError("nothing goes there")
sys.addaudithook(hook)
from privfed.cli.app import main
codes = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["privfed", "export", "mlflow", *arguments]
    try:
        main()
    except SystemExit as ended:
        codes.append(ended.code or 0)
import mlflow.telemetry
print(json.dumps({"codes": codes, "reached": reached, "off": mlflow.telemetry.get_telemetry_client() is None}))
"""


def export(*commands: list[str]) -> tuple[dict[str, Any], str]:
    """Commands in a process of its own, which no sign tells that it is tested; where it connects to."""
    signs = ("CI", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")
    done = subprocess.run(
        [sys.executable, "-c", _ALONE, json.dumps(commands)],
        env={key: value for key, value in os.environ.items() if key not in signs},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told, done.stdout + done.stderr


def steps(run: dict[str, Any], name: str) -> list[int]:
    return [int(one["step"]) for one in run["metrics"] if one["key"] == name]


def test_nothing_goes_elsewhere_and_what_a_server_answers_is_not_repeated(tmp_path: Path, server: Server) -> None:
    home = watched(tmp_path / "run", SITES)
    server.refuses = "secret-experiment"
    with_password = server.address.replace("//", "//user:hush@")
    told, text = export(
        [str(home), "--tracking-uri", server.address],
        [str(home), "--tracking-uri", with_password, "--experiment", server.refuses],
    )
    assert told["codes"] == [0, 1] and "does not take the run (PERMISSION_DENIED)" in text
    assert set(told["reached"]) == {"127.0.0.1"} and told["off"]
    assert "hush" not in text and "secret words" not in text
    sent = json.dumps(server.requests)
    for private in (*SITES, str(tmp_path), os.uname().nodename):
        assert private not in sent


def test_mlflow_has_the_run_once(tmp_path: Path, server: Server) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    stand_at(home, 2)

    def given() -> dict[str, Any]:
        watcher = Watcher(home)
        Tracker(server.address).write(watcher, watcher.look())
        (run,) = server.runs.values()
        return run

    run = given()
    assert steps(run, "global") == steps(run, "epsilon_max") == [1, 2] and run["status"] == "RUNNING"
    assert run["tags"]["privfed.run"] == "made" and "ε at δ = 10⁻⁵" in run["tags"]["epsilon_is"]
    assert run["params"]["method"] == "reptile" and run["params"]["delta"] == "1e-05"
    watched(tmp_path / "whole", SITES)  # the same run, and over
    os.rename(tmp_path / "whole" / folder.SUMMARY, home / folder.SUMMARY)
    for _ in range(2):
        assert steps(given(), "global") == [1, 2, 3, 4, 5, 6] and run["status"] == "FINISHED"
    assert list(server.experiments) == ["breast-cancer"]


def test_mlflow_itself_reads_what_the_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not here: pip install 'privfed[mlflow]'")
    from mlflow.tracking import MlflowClient

    address = (tmp_path / "store").as_uri()
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(ConfigError, match="tracking server"):
        Tracker(address)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    watcher = Watcher(watched(tmp_path / "run", SITES, aborted={4: "few"}))
    for _ in range(2):
        number = Tracker(address).write(watcher, watcher.look())
    client = MlflowClient(tracking_uri=address)
    for name in ("global", "epsilon_max", "faults", "sites_contributed"):
        history = sorted(client.get_metric_history(number, name), key=lambda metric: metric.step)
        assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
        assert [metric.value for metric in history] == [figures(watcher, row)[name] for row in watcher.rows]
    run = client.get_run(number)
    assert run.info.status == "FINISHED" and run.info.run_name == "made" and run.data.params["noise"] == "local"
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_a_server_that_does_not_answer_is_told(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.close()
    watcher = Watcher(watched(tmp_path / "run", SITES))
    with pytest.raises(TrackingError, match="does not take the run"):
        Tracker(server.address).write(watcher, watcher.look())


def test_a_resumed_run_runs_again_there(tmp_path: Path, server: Server) -> None:
    home = watched(tmp_path / "run", SITES, over=False)
    stand_at(home, 3)
    watcher, tracker = Watcher(home), Tracker(server.address, "another name")
    number = tracker.write(watcher, watcher.look())
    server.runs[number]["status"] = "FAILED"
    stand_at(home, 4)
    assert tracker.write(watcher, watcher.look()) == number
    assert server.runs[number]["status"] == "RUNNING" and steps(server.runs[number], "seconds") == [1, 2, 3, 4]
    assert list(server.experiments) == ["another name"]


def test_many_rounds_go_in_requests_that_mlflow_takes(tmp_path: Path, server: Server) -> None:
    home = watched(tmp_path / "run", SITES, over=False, rounds=250)
    watcher = Watcher(home)
    Tracker(server.address).write(watcher, watcher.look())
    sizes = [len(body.get("metrics", [])) for path, body in server.requests if path.endswith("log-batch")]
    assert max(sizes) <= 1000 and sum(sizes) == 2500 and all(size % 10 == 0 for size in sizes)


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "mlflow", str(tmp_path), "--tracking-uri", "databricks://x"])
    assert isinstance(result.exception, ConfigError) and exit_code(result.exception) == 2
