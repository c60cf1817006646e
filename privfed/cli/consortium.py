"""``privfed consortium``: who takes part, under whose signature."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .output import print_json

if TYPE_CHECKING:
    from privfed.deployment.papers import EngineName

app = typer.Typer(help="Found a consortium of hospitals and let sites in.", no_args_is_help=True, rich_markup_mode=None)

Home = Annotated[Path, typer.Argument(help="The coordinator's folder.")]
Engine = Annotated[str, typer.Option("--engine", metavar="nvflare|flower", help="What carries the messages.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def new(
    home: Home,
    experiment: Annotated[Path, typer.Option("--experiment", help="A TOML file: its [data] and [task] are agreed on.")],
    name: Annotated[str, typer.Option("--name", help="The consortium's name.")],
    contact: Annotated[str, typer.Option("--contact", help="Whom sites call.")],
    host: Annotated[
        str, typer.Option("--host", help="The name or address that sites reach the server at.")
    ] = "localhost",
    port: Annotated[int, typer.Option("--port", help="The one port there is.")] = 8102,
    engine: Engine = "nvflare",
    json: Json = False,
) -> None:
    """Make the coordinator's keys, certificate authority and terms in a new folder."""
    from privfed import config_io
    from privfed.deployment import papers
    from privfed.deployment.consortium import Consortium

    made = Consortium.create(
        home,
        config_io.load_config(experiment),
        name=name,
        contact=contact,
        host=host,
        port=port,
        engine=_engine(engine),
    )
    mark = papers.fingerprint(bytes.fromhex(made.terms.authority))
    if json:
        print_json({"home": str(made.home), "authority": made.terms.authority, "fingerprint": mark})
        return
    typer.echo(
        f"The consortium {name!r} is in {home}. Its authority's fingerprint, which every site must hear from you in "
        f"person:\n\n  {mark}\n\n{home / 'authority.key'} signs the list of sites: move it to a medium that is kept "
        "offline, and give its path to privfed consortium roster. Next, at each site:\n"
        f"  privfed consortium request FOLDER --consortium {name} --name SITE --organisation HOSPITAL --contact WHOM"
        + (f" --engine {engine}" if engine != "nvflare" else "")
    )


@app.command()
def request(
    home: Annotated[Path, typer.Argument(help="A new folder: the site's own.")],
    consortium: Annotated[str, typer.Option("--consortium", help="The consortium's name.")],
    name: Annotated[str, typer.Option("--name", help="The site's name.")],
    organisation: Annotated[str, typer.Option("--organisation", help="The hospital's short name.")],
    contact: Annotated[str, typer.Option("--contact", help="Whom the coordinator calls.")],
    engine: Engine = "nvflare",
    json: Json = False,
) -> None:
    """At a site: make its keys, which never leave, and a request to take part."""
    from privfed.deployment import papers
    from privfed.deployment.hospital import Hospital

    body = Hospital.request(
        home,
        consortium=consortium,
        name=name,
        organisation=organisation,
        contact=contact,
        engine=_engine(engine),
    )
    mark, path = papers.read_application(body)[0].fingerprint, home / f"{name}.request"
    if json:
        print_json({"request": str(path), "fingerprint": mark})
        return
    typer.echo(f"Send {path} to the coordinator, and read this to them on the telephone:\n\n  {mark}")


@app.command()
def approve(
    home: Home,
    request: Annotated[Path, typer.Argument(help="What a site sent.")],
    fingerprint: Annotated[
        str | None, typer.Option("--fingerprint", help="What the site read out; asked for if not given.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="The site is known, and changes its keys.")] = False,
    json: Json = False,
) -> None:
    """Take a site in whose fingerprint you heard from a person that you know."""
    from privfed.deployment import files, papers
    from privfed.deployment.consortium import Consortium

    body = files.read(request)
    applicant, _ = papers.read_application(body)
    if fingerprint is None:
        if not typer.confirm(f"{applicant.name} ({applicant.organisation}): is {applicant.fingerprint} right?"):
            raise files.DeploymentError(
                f"{applicant.name!r} is not approved, and nothing was signed: call a person whom you know there, on a "
                "number that does not come from the request"
            )
    elif fingerprint.replace(" ", "").lower() != applicant.fingerprint.replace(" ", ""):
        raise files.DeploymentError(
            f"the request of {applicant.name!r} has the fingerprint {applicant.fingerprint}: it is not from who you "
            "spoke to. Nothing was signed"
        )
    Consortium(home).approve(body, replace=replace)
    if json:
        print_json({"name": applicant.name, "fingerprint": applicant.fingerprint})
    else:
        typer.echo(f"{applicant.name} is approved. When all are: privfed consortium roster {home}")


@app.command()
def roster(
    home: Home,
    authority_key: Annotated[
        Path | None, typer.Option("--authority-key", help="Where the offline key is [default: in the folder]")
    ] = None,
    json: Json = False,
) -> None:
    """Sign the list of sites as it is now; each site accepts it by itself."""
    from privfed.deployment.consortium import Consortium

    consortium = Consortium(home)
    made = consortium.next_roster(authority_key)
    names = [member.name for member in made.members]
    if json:
        print_json({"version": made.version, "sites": names, "file": str(consortium.roster_file())})
        return
    typer.echo(f"Roster {made.version}: {', '.join(names)}. New sites get it with their kit. If others had one before:")
    typer.echo(f"  send them {consortium.roster_file()}, and have them type privfed site roster FOLDER FILE")


@app.command()
def suspend(home: Home, name: Annotated[str, typer.Argument(help="The site.")]) -> None:
    """Leave a site out from the next roster on."""
    from privfed.deployment.consortium import Consortium

    Consortium(home).suspend(name)
    typer.echo(f"{name} is suspended. It stays in the roster until you sign the next: privfed consortium roster {home}")


@app.command()
def kit(
    home: Home,
    name: Annotated[str, typer.Argument(help="The site.")],
    out: Annotated[Path | None, typer.Option("--out", help="A file [default: NAME.kit]")] = None,
) -> None:
    """Write what goes back to an approved site. No secret is in it."""
    from privfed.deployment import files
    from privfed.deployment.consortium import Consortium

    path = out or Path(f"{name}.kit")
    files.write(path, Consortium(home).kit(name))
    typer.echo(f"Send {path} to {name}.")


@app.command()
def node(
    home: Home,
    name: Annotated[str, typer.Argument(help="The site.")],
    number: Annotated[int, typer.Argument(help="What flwr supernode register said of its key.")],
) -> None:
    """Over Flower: say which SuperNode is a site's."""
    from privfed.deployment.consortium import Consortium

    Consortium(home.absolute()).set_node(name, number)
    typer.echo(f"{name} is node {number}.")


@app.command("account")
def account_of(
    home: Home,
    name: Annotated[str, typer.Argument(help="The site.")],
    out: Annotated[Path | None, typer.Option("--out", help="A file [default: NAME.account]")] = None,
) -> None:
    """Write what you know of a site's spends: its own signed words, and the runs. For a site that restored a backup."""
    from privfed.deployment import account, files
    from privfed.deployment.consortium import Consortium

    path = out or Path(f"{name}.account")
    files.write(path, account.account(Consortium(home.absolute()), name))
    typer.echo(f"Send {path} to {name}; it types: privfed site catch-up FOLDER FILE")


def _engine(name: str) -> "EngineName":
    if name not in ("nvflare", "flower"):
        raise typer.BadParameter(f"there is no engine {name!r}: nvflare or flower")
    return name  # type: ignore[return-value]  # checked
