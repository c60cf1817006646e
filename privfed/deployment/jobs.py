"""Jobs of FLARE: what is submitted, by whom, and what became of it.

A job of ours has no code: FLARE's two stubs that name one class each, and one text. FLARE signs it with the key of who
submits it, and every site checks that signature before it starts anything.
"""

import json
import shutil
import socket
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

from . import files
from .kits import CONTROLLER, EXECUTOR

OVER = ("FINISHED:", "FAILED", "ABORTED", "ABANDONED")


def write_job(folder: Path, text: str, *, sites: int, controller: str = CONTROLLER, executor: str = EXECUTOR) -> None:
    """A job's folder, in place of an earlier one.

    Args:
        text: what our side of the job reads.
        sites: fewest that must be there for it to start.
    """
    from privfed.engines.nvflare import JOB

    shutil.rmtree(folder, ignore_errors=True)
    config = folder / "app" / "config"
    everywhere = {"format_version": 2, "task_data_filters": [], "task_result_filters": [], "components": []}
    server = {
        **everywhere,
        "server": {"heart_beat_timeout": 600},
        "workflows": [{"id": "privfed", "path": controller, "args": {}}],
    }
    client = {**everywhere, "executors": [{"tasks": ["privfed"], "executor": {"path": executor, "args": {}}}]}
    meta = {"name": "privfed", "resource_spec": {}, "min_clients": sites, "deploy_map": {"app": ["@ALL"]}}
    for path, value in (
        (folder / "meta.json", meta),
        (config / "config_fed_server.json", server),
        (config / "config_fed_client.json", client),
    ):
        files.write(path, json.dumps(value, indent=1).encode())
    files.write(config / JOB, text.encode())


def login(kit: Path) -> Any | None:
    """A session as the person whose kit it is; None while the server does not answer."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    admin = json.loads(files.read(kit / "startup" / "fed_admin.json"))["admin"]
    try:
        socket.create_connection((admin["host"], admin["port"]), timeout=3.0).close()
    except OSError:
        return None
    # Its progress is for nobody's standard output; and it raises bare exceptions for a server that is not up
    with suppress(Exception), redirect_stdout(sys.stderr):
        return new_secure_session(admin["username"], str(kit), timeout=3.0, auto_login_max_tries=1)
    return None


def clients(session: Any) -> list[str]:
    """The names of the sites that are connected."""
    return [client.name for client in session.get_system_info().client_info]


def status(session: Any, job: str) -> str:
    """FLARE's own word on a job. It is no proof of success: our checkpoint is."""
    return str(session.get_job_meta(job).get("status", ""))


def is_over(status: str) -> bool:
    return status.startswith(OVER)
