"""Who should not get in, over real processes: ``make test-pilot``."""

import json
import os
import shutil
import socket
import ssl
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from privfed import config_io
from privfed.config import Config
from privfed.deployment import files, jobs, kits, runs
from privfed.deployment.blocks import Block
from privfed.deployment.consortium import ADMIN, SERVER
from privfed.deployment.hospital import KIT, LEDGER
from tests.privfed.deployment import house
from tests.privfed.deployment.house import SITES
from tests.privfed.deployment.test_blocks import INSECURE, spends

pytest.importorskip("nvflare", reason="the extra [nvflare] is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.skipif(not os.environ.get("PRIVFED_PILOT"), reason="minutes over real processes: make test-pilot"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return house.experiment(house.tables(tmp_path_factory.mktemp("tables")), rounds=4, privacy=INSECURE)


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Iterator[Any]:
    from tests.privfed.deployment.loopback import Loopback

    home = tmp_path_factory.mktemp("consortium")
    (home / "experiment.toml").write_text(config_io.to_toml(config))
    with Loopback(home, config) as loopback:
        loopback.start(SERVER)
        yield loopback


def stranger(loopback: Any, home: Path, config: Config) -> Path:
    """A kit for "north" of another authority, that knows where this consortium's server is."""
    with_other = home / "other"
    from tests.privfed.engines.flare_rig import quick_certificates

    with quick_certificates():
        house.found(with_other, config, port=loopback.consortium.terms.port)
    return with_other / "north" / KIT


def started(loopback: Any, kit: Path, site: str, home: Path) -> Any:
    from privfed.deployment import processes
    from tests.privfed.engines.flare_rig import Party

    return Party(processes.client_command(kit, site=site, organisation=f"{site}-hospital"), home / "intruder.out")


def kept_out(loopback: Any, kit: Path, site: str, home: Path, *words: bytes) -> None:
    """``kit`` does not get in as ``site``, and the log has one of the words."""
    from tests.privfed.deployment.loopback import until

    party = started(loopback, kit, site, home)
    try:

        def refused() -> bool:
            text = b"".join(path.read_bytes() for path in (home / "intruder.out", kit / "log.txt") if path.exists())
            return any(word in text for word in words)

        until(refused, 90)
        assert site not in loopback.clients()
    finally:
        party.kill()


def test_a_site_of_another_authority_is_not_let_in(loopback: Any, tmp_path: Path, config: Config) -> None:
    kit = stranger(loopback, tmp_path, config)
    kept_out(loopback, kit, "north", tmp_path, b"CERTIFICATE_VERIFY_FAILED", b"certificate verify failed")


def test_the_server_talks_to_nobody_without_a_certificate_of_its_own_authority(
    loopback: Any, tmp_path: Path, config: Config
) -> None:
    ours, theirs = loopback.home / "north" / KIT / "startup", stranger(loopback, tmp_path, config) / "startup"
    reachable = handshake(loopback, ours / "rootCA.pem", ours)
    assert reachable is None
    for certificate in (theirs, None):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            raise handshake(loopback, ours / "rootCA.pem", certificate) or AssertionError("it got in")


def test_the_server_listens_on_the_given_address_alone(tmp_path: Path, config: Config) -> None:
    """Under a name that is not loopback's FLARE's own choice is every address of the machine."""
    from privfed.deployment import processes
    from privfed.deployment.consortium import ORGANISATION, Consortium
    from tests.privfed.engines.flare_rig import Party, quick_certificates, until
    from tests.privfed.ports import free_port

    port, home = free_port(), tmp_path / "coordinator"
    with quick_certificates():
        Consortium.create(home, config, name="elsewhere", contact="c", host="fl.example.org", port=port)

    def listening() -> list[str]:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]

    command = processes.server_command(home / SERVER, organisation=ORGANISATION, address="127.0.0.3")
    party = Party(command, tmp_path / "server.out")
    try:
        assert until(listening, 120) == [f"0300007F:{port:04X}"]
    finally:
        party.kill()


def handshake(loopback: Any, authority: Path, certificate: Path | None) -> Exception | None:
    """What a TLS client meets at the server: None if the server waits for what it has to say."""
    context = ssl.create_default_context(cafile=str(authority))
    if certificate is not None:
        context.load_cert_chain(certificate / "client.crt", certificate / "client.key")
    port = loopback.consortium.terms.port
    try:
        with socket.create_connection(("localhost", port), timeout=5.0) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                # In TLS 1.3 the server's refusal comes after the client's part of the handshake
                return None if secure.recv(1) else ConnectionResetError("the server hung up")
    except TimeoutError:
        return None
    except (ssl.SSLError, ConnectionError) as error:
        return error


def test_a_site_with_its_own_certificate_can_not_be_another(loopback: Any, tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(loopback.home / "south" / KIT, kit)
    client = json.loads((kit / "startup" / "fed_client.json").read_text())
    client["client"]["fqsn"] = "north"
    (kit / "startup" / "fed_client.json").write_text(json.dumps(client))
    kept_out(loopback, kit, "north", tmp_path, b"uthenticat", b"denied", b"rejected", b"not match", b"mismatch")


def test_a_tampered_job_is_not_run(loopback: Any, tmp_path: Path, config: Config) -> None:
    """Changed at the server after its author signed it. It waits there for sites, and then they come."""
    run = runs.begin(loopback.consortium, config)
    job = submitted(loopback, tmp_path, Block(run.path.name, 1).to_text())
    changed = 0
    for path in (loopback.consortium.home / SERVER / "jobs").rglob("*"):
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                parts = {name: archive.read(name) for name in archive.namelist()}
            for name in parts:
                if name.endswith("privfed.toml"):
                    parts[name] = parts[name].replace(b"rounds = 1", b"rounds = 4")
                    changed += 1
            with zipfile.ZipFile(path, "w") as archive:
                for name, body in parts.items():
                    archive.writestr(name, body)
    assert changed == 1
    loopback.start(*SITES)
    assert not ended(loopback, job).startswith("FINISHED:COMPLETED")
    assert runs.progress(run) == []
    assert all(spends(loopback.home / site / LEDGER, site) == [] for site in SITES)


def test_a_job_with_code_is_not_run(loopback: Any, tmp_path: Path) -> None:
    sites_there(loopback)
    mark = tmp_path / "was-here"
    folder = job_folder(tmp_path, 'run = "x"\nrounds = 1\n')
    files.write(folder / "app" / "custom" / "evil.py", f"open({str(mark)!r}, 'w')\n".encode())
    client = json.loads((folder / "app" / "config" / "config_fed_client.json").read_text())
    client["executors"][0]["executor"]["path"] = "evil.Executor"
    files.write(folder / "app" / "config" / "config_fed_client.json", json.dumps(client).encode())
    refused(loopback, folder)
    assert not mark.exists()


def test_a_site_builds_no_other_class(loopback: Any, tmp_path: Path) -> None:
    """The server's part of the job may end as it likes; every site turns its own down."""
    sites_there(loopback)
    from tests.privfed.deployment.loopback import until

    name = "nvflare.app_common.np.np_trainer.NPTrainer"
    folder = job_folder(tmp_path, 'run = "x"\nrounds = 1\n', executor=name)
    with loopback.session() as session:
        job = session.submit_job(str(folder))
    logs = [loopback.home / site / KIT / job / "log.txt" for site in SITES]
    turned_down = (b"ComponentNotAuthorized", b"not in allow_list")
    until(lambda: all(log.exists() and any(word in log.read_bytes() for word in turned_down) for log in logs), 150)
    ended(loopback, job)


def test_the_server_builds_no_other_class(loopback: Any, tmp_path: Path) -> None:
    sites_there(loopback)
    name = "nvflare.app_common.workflows.fedavg.FedAvg"
    refused(loopback, job_folder(tmp_path, 'run = "x"\nrounds = 1\n', controller=name))


def test_a_job_can_not_name_a_path(loopback: Any, tmp_path: Path) -> None:
    from tests.privfed.deployment.loopback import until

    sites_there(loopback)
    said = loopback.consortium.home / "last-block.txt"
    said.unlink(missing_ok=True)
    job = submitted(loopback, tmp_path, 'run = "../../north"\nrounds = 1\n')
    until(lambda: said.exists() and b"the job: " in said.read_bytes(), 150)
    # It ended at once: FLARE waits for a site whose process was still starting, and missed that
    with loopback.session() as session, suppress(Exception):
        session.abort_job(job)


def test_the_person_who_submits_jobs_has_no_shell_on_sites(loopback: Any) -> None:
    sites_there(loopback)
    with loopback.session() as session:
        for ask in (
            lambda: session.ls_target("north"),
            lambda: session.cat_target("north", file="local/resources.json"),
            lambda: session.grep_target("north", pattern="class", file="local/resources.json"),
        ):
            assert ask() == "invalid_request"  # a site does not know these orders, whoever gives them
        with pytest.raises(Exception, match=r"(?i)authoriz|permi|not allowed"):
            session.ls_target("server")


def test_who_holds_the_server_without_the_coordinators_key_is_listened_to_by_nobody(loopback: Any) -> None:
    """All of FLARE's kit, and another key in the place of the coordinator's."""
    sites_there(loopback)
    key = loopback.consortium.home / "ledger.db.key"
    before, books = key.read_bytes(), [spends(loopback.home / site / LEDGER, site) for site in SITES]
    own = (loopback.consortium.home / LEDGER).read_bytes()
    key.write_bytes(bytes(range(32)))
    try:
        found = loopback.preflight(loopback.home / "experiment.toml")
        assert not found["answers"]["ok"] and not found["a secure sum over zeros"]["ok"]
        _, errors = (command := loopback.submit(loopback.home / "experiment.toml")).communicate(timeout=300)
    finally:
        key.write_bytes(before)
        # Its own key does not go on from what the other one wrote into the book: later tests would have no round
        (loopback.consortium.home / LEDGER).write_bytes(own)
    assert command.returncode == 3, errors.decode()
    assert not any(report.contributed for report in runs.progress(loopback.run()))
    assert b"not signed by this consortium's coordinator" in errors
    assert books == [spends(loopback.home / site / LEDGER, site) for site in SITES]


def test_a_weaker_promise_than_a_sites_policy_is_refused_with_the_line(loopback: Any) -> None:
    sites_there(loopback)
    policy = loopback.home / "west" / "policy.toml"
    before = policy.read_text()
    policy.write_text(before.replace("max_epsilon = 4.0", "max_epsilon = 0.01"))
    try:
        out, errors = (command := loopback.submit(loopback.home / "experiment.toml")).communicate(timeout=300)
    finally:
        policy.write_text(before)
    assert command.returncode == 3, errors.decode()
    assert "policy.max_epsilon" in json.loads(out)["refusals"]["west"]
    assert not [entry for entry in spends(loopback.home / "west" / LEDGER, "west") if entry[0] == "charge"]


def test_a_round_that_was_done_is_not_done_again_with_another_model(loopback: Any, config: Config) -> None:
    """A coordinator that goes back to an older checkpoint, with another key for its own messages."""
    from tests.privfed.deployment.loopback import until

    sites_there(loopback)
    before = sorted(loopback.consortium.home.glob("runs/*"))
    command = loopback.submit(loopback.home / "experiment.toml")
    until(lambda: sorted(loopback.consortium.home.glob("runs/*")) != before)
    (name,) = {path.name for path in loopback.consortium.home.glob("runs/*")} - {path.name for path in before}
    run = until(lambda: loopback.run() if loopback.run().path.name == name else None)
    old = until(lambda: run.path.joinpath("checkpoint.safetensors").exists() and run.load_checkpoint(), 200)
    assert old.next_round >= 1
    command.communicate(timeout=300)
    charged = {site: spends(loopback.home / site / LEDGER, site) for site in SITES}
    done = runs.progress(run)
    assert len(done) == config.rounds
    (run.path / "summary.json").unlink()
    (run.path / "journal.db").touch(0o600)  # what its own code would miss
    run.save_checkpoint(old)
    run.keep_metrics(run.metrics()[: old.next_round])
    again = loopback.command("coordinator", "resume", loopback.consortium.home, run.path.name)
    again.communicate(timeout=300)
    assert {site: spends(loopback.home / site / LEDGER, site) for site in SITES} == charged
    reports = runs.progress(run)[old.next_round :]
    assert not any(report.contributed for report in reports if report.round < config.rounds - 1)


def sites_there(loopback: Any) -> None:
    """All sites are connected, whichever tests came before."""
    from tests.privfed.deployment.loopback import until

    loopback.start(*(site for site in SITES if site not in loopback.parties))
    until(lambda: set(loopback.clients()) >= set(SITES), 120)


def job_folder(home: Path, text: str, *, executor: str = kits.EXECUTOR, controller: str = kits.CONTROLLER) -> Path:
    folder = home / "job"
    jobs.write_job(folder, text, sites=2, executor=executor, controller=controller)
    return folder


def submitted(loopback: Any, home: Path, text: str) -> str:
    with loopback.session() as session:
        job: str = session.submit_job(str(job_folder(home, text)))
    return job


def ended(loopback: Any, job: str) -> str:
    from tests.privfed.deployment.loopback import over, until

    status: str = until(over(loopback, job), 150)
    return status


def refused(loopback: Any, folder: Path) -> None:
    """The job is turned away, or does not come to run."""
    with loopback.session() as session:
        try:
            job = session.submit_job(str(folder))
        except Exception:
            return
    assert not ended(loopback, job).startswith("FINISHED:COMPLETED")


__all__ = ["ADMIN"]
