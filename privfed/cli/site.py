"""``privfed site``: what a hospital types on its own machine."""

from pathlib import Path
from typing import Annotated

import typer

from .exits import INCOMPLETE
from .output import print_json

app = typer.Typer(help="A hospital's own side of a consortium.", no_args_is_help=True, rich_markup_mode=None)
policy = typer.Typer(help="What this site demands.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(policy, name="policy")

Home = Annotated[Path, typer.Argument(help="The site's folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def init(
    home: Home,
    kit: Annotated[Path, typer.Option("--kit", help="What the coordinator sent back.")],
    data: Annotated[Path, typer.Option("--data", help="This site's table: CSV, Parquet, or a database file (.toml).")],
    authority: Annotated[str, typer.Option("--authority", help="The fingerprint that you heard from the coordinator.")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="A policy.toml of your own; lines that it lacks are the strict ones")
    ] = None,
) -> None:
    """Set the site up, and say in plain words what it agreed to."""
    from privfed.deployment import files, words
    from privfed.deployment.hospital import Hospital, given_policy

    own = given_policy(policy) if policy else None
    hospital = Hospital.open(home)
    terms = hospital.install(files.read(kit), authority=authority, data=data, policy=own)
    hospital = Hospital.open(home)
    records = len(hospital.records())
    typer.echo(words.agreement(terms, hospital.policy, name=hospital.file.name, data=hospital.file.data))
    how = f"privfed site start {home}" if terms.engine == "nvflare" else "as docs/flower.md says"
    typer.echo(f"\n{records} records can be read. Start it: {how}")


@app.command()
def start(home: Home) -> None:
    """Run the site until the process is ended."""
    from privfed.deployment import kits, papers, processes
    from privfed.deployment.hospital import KIT, Hospital

    hospital = Hospital.open(home)
    papers.require_engine(hospital.file.engine, "nvflare")
    _ = hospital.policy, hospital.roster, hospital.identity  # refused now, not when the first job comes
    hospital.require_current()
    kits.harden(hospital.home / KIT, "site", hospital.home)  # whatever was done to it since
    typer.echo(
        f"{hospital.file.name} looks for its coordinator until it is stopped; its log: {hospital.home / KIT}/log.txt"
    )
    processes.become(
        processes.client_command(hospital.home / KIT, site=hospital.file.name, organisation=hospital.file.organisation)
    )


@app.command()
def serve(
    home: Home,
    socket: Annotated[Path, typer.Option("--socket", help="A new socket, which its SuperNode's user may write to.")],
) -> None:
    """Over Flower: answer at a socket until the process is ended, as a user that the SuperNode is not."""
    import os

    import torch

    from privfed.deployment import papers, woken
    from privfed.deployment.hospital import Hospital
    from privfed.engines import relay

    hospital = Hospital.open(home)
    papers.require_engine(hospital.file.engine, "flower")
    _ = hospital.policy, hospital.roster, hospital.identity  # refused now, not when the first message comes
    hospital.require_current()
    torch.set_num_threads(1)
    os.umask(0o077)
    typer.echo(f"{hospital.file.name} answers at {socket}", err=True)
    relay.serve(socket, lambda request, deposit: woken.answer_signed(hospital.home, request, deposit))


@app.command()
def status(
    home: Home,
    check: Annotated[
        bool, typer.Option("--check", help="Fail if the site can not take part: for whoever supervises it.")
    ] = False,
    json: Json = False,
) -> None:
    """What this site was asked, what it agreed to, and what it has spent."""
    from privfed.deployment.hospital import Hospital
    from privfed.deployment.site_status import read

    hospital = Hospital.open(home)
    found = read(hospital)
    if check:
        _ = hospital.identity
        hospital.require_current()
    if json:
        print_json(found)
        return
    limit = "none of its own" if found.max_epsilon is None else f"{found.max_epsilon:g}"
    runs = f"{len(found.runs)} run{'s' if len(found.runs) != 1 else ''}"
    typer.echo(f"{found.name}: roster {found.roster}, {runs}")
    typer.echo(f"spent: ε = {found.epsilon:.4g} at δ = {found.delta:g}, all runs together; limit {limit}")
    if (beyond := _beyond(found.epsilon, found.max_epsilon)) is not None:
        typer.echo(beyond)
    for run in found.runs:
        rounds = "all rounds charged by catch-up" if run.caught_up else f"{run.rounds} rounds charged"
        typer.echo(f"  {run.run}: {rounds}, last {run.last or 'never'}")
    for line in found.refusals:
        typer.echo(f"  {line}")


def _beyond(epsilon: float, limit: float | None) -> str | None:
    """What it means that more is spent than the site's policy allows; None if it is not."""
    if limit is None or epsilon <= limit:
        return None
    return (
        f"That is over the limit of {limit:g}: this site takes part in nothing that spends until max_epsilon "
        "in its policy.toml allows it"
    )


@app.command()
def roster(home: Home, file: Annotated[Path, typer.Argument(help="A signed roster.")]) -> None:
    """Accept the next list of sites."""
    from privfed.deployment import files
    from privfed.deployment.hospital import Hospital

    made = Hospital.open(home).accept_roster(files.read(file))
    typer.echo(f"Accepted roster {made.version}: {', '.join(member.name for member in made.members)}")


@app.command()
def rotate(
    home: Home,
    contact: Annotated[str, typer.Option("--contact", help="Whom the coordinator calls.")],
    json: Json = False,
) -> None:
    """Make new keys and a request for them. The old ones stay in use until `renew`."""
    from privfed.deployment import papers
    from privfed.deployment.hospital import NEXT, Hospital

    hospital = Hospital.open(home)
    mark = papers.read_application(hospital.rotate(contact=contact))[0].fingerprint
    path = home / NEXT / f"{hospital.file.name}.request"
    if json:
        print_json({"request": str(path), "fingerprint": mark})
        return
    typer.echo(f"Send {path} to the coordinator, and read this to them on the telephone:\n\n  {mark}")


@app.command()
def renew(
    home: Home, kit: Annotated[Path, typer.Option("--kit", help="What the coordinator sent back for the new keys.")]
) -> None:
    """Go over to the new keys, and delete the old ones. Stop the service before, and start it after."""
    from privfed.deployment import files
    from privfed.deployment.hospital import Hospital

    made = Hospital.open(home).renew(files.read(kit))
    typer.echo(f"The new keys are in use, with roster {made.version}. Start the site: privfed site start {home}")


@app.command()
def backup(home: Home, out: Annotated[Path, typer.Argument(help="A new file. It will hold secrets.")]) -> None:
    """Write the site's keys, certificate, policy and ledger to one file. The site may be at work."""
    from privfed.deployment import backup
    from privfed.deployment.hospital import Hospital

    made = backup.make(Hospital.open(home), out)
    typer.echo(
        f"{out} holds {made.site} with {made.sequence} ledger entries, and its private keys: keep it locked away"
    )


@app.command()
def restore(
    home: Annotated[Path, typer.Argument(help="The site's folder, or a new one.")],
    file: Annotated[Path, typer.Argument(help="A backup.")],
) -> None:
    """Put a backup back. The site takes part again after `catch-up`: the ledger may lack what was spent since."""
    from privfed.deployment import backup, files

    made = backup.restore(home, files.read(file))
    typer.echo(
        f"{made.site} stands as of {made.made}, with {made.sequence} entries in its ledger. What was spent since "
        "is not in it, so the site takes part in nothing yet. Have the coordinator send an account "
        "(privfed consortium account); then:\n"
        f"  privfed site catch-up {home} FILE"
    )


@app.command("catch-up")
def catch_up(home: Home, file: Annotated[Path, typer.Argument(help="The coordinator's account of this site.")]) -> None:
    """After a restore: charge what the ledger may lack, at its worst. Then the site takes part again."""
    from privfed.deployment import account, files
    from privfed.deployment.hospital import Hospital

    hospital = Hospital.open(home)
    done = account.catch_up(hospital, files.read(file))
    for run in done.charged:
        typer.echo(f"charged for all its rounds: {run}")
    typer.echo(f"spent: ε = {done.epsilon:.4g} at δ = {done.delta:g}, all runs together")
    if (beyond := _beyond(done.epsilon, hospital.policy.max_epsilon)) is not None:
        typer.echo(beyond)
    if done.outdated:
        typer.echo(f"This site's keys are of before they were changed. Make new ones: privfed site rotate {home}")


@policy.command("check")
def check(
    home: Home, experiment: Annotated[Path, typer.Argument(help="A TOML file that the coordinator means to run.")]
) -> None:
    """Say whether this site would take part in an experiment, and which line of its policy is against it."""
    from privfed import config_io
    from privfed.deployment.hospital import Hospital
    from privfed.deployment.site_status import would_refuse

    reason = would_refuse(Hospital.open(home), config_io.load_config(experiment))
    typer.echo("this site would take part" if reason is None else f"this site would refuse: {reason}")
    if reason is not None:
        raise typer.Exit(INCOMPLETE)
