"""The whole way over real processes and mTLS: the run of one process, in three folders."""

import json
import stat
from pathlib import Path

import pytest

from privfed import config_io
from privfed.deployment.hospital import LEDGER
from tests.privfed.deployment import house
from tests.privfed.deployment.test_blocks import INSECURE, same_as_in_process, spends

pytest.importorskip("nvflare", reason="the extra [nvflare] is not installed")

# FLARE's session, in this process, leaves sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_a_masked_run_over_three_processes_and_mtls_equals_the_run_in_one(tmp_path: Path) -> None:
    from tests.privfed.deployment.loopback import Loopback

    config = house.experiment(house.tables(tmp_path / "tables"), privacy=INSECURE)
    path = tmp_path / "experiment.toml"
    path.write_text(config_io.to_toml(config))
    with Loopback(tmp_path, config) as loopback:
        loopback.everybody()
        looked = loopback.preflight(path)
        assert all(found["ok"] for found in looked.values()), looked
        assert looked["a secure sum over zeros"]["found"].startswith("3 sites, ")
        assert "60 s" in looked["clocks"]["found"] and "privfed " in looked["versions"]["found"]
        assert not any(spends(tmp_path / site / LEDGER, site) for site in house.SITES)  # nothing is spent
        submitted = loopback.submit(path)
        run = loopback.run()
        watching = loopback.command("coordinator", "watch", loopback.consortium.home, "--json")
        out, errors = submitted.communicate(timeout=300)
        assert submitted.returncode == 0, errors.decode()
        seen = [json.loads(line) for line in watching.communicate(timeout=300)[0].splitlines()]
        assert watching.returncode == 0 and seen[-1]["state"] == "over" and seen[-1]["done"] == config.rounds
        assert {view["run"] for view in seen} == {run.path.name} and seen[-1]["epsilon"] > 0
        assert any(view["state"] == "at work" for view in seen)
        summary = json.loads(out)
        assert summary["complete"] and summary["refusals"] == {}
        same_as_in_process(tmp_path, config, loopback.run())
        # Nothing of a record or a key is in what anybody can read
        logs = loopback.logs()
        for site in house.SITES:
            assert stat.S_IMODE((tmp_path / site / LEDGER).stat().st_mode) & 0o077 == 0
            for secret in json.loads((tmp_path / site / "keys.json").read_text()).values():
                assert secret.encode() not in logs
            rows = Path(config.data.files[site]).read_text().splitlines()[1:]  # type: ignore[union-attr]
            assert not any(row.encode() in logs for row in rows)
        private = [*tmp_path.glob("*/kit/startup/*.key"), *tmp_path.glob("*/keys.json"), *tmp_path.glob("*/*.key")]
        assert len(private) >= 3 * 3 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
