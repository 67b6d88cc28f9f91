"""`rollout remote check URL`: play the trainer against a remote rollout server and say what it does wrong.

Invariant: whatever the server does the check ends, within its deadlines, and leaves nothing behind; its exit code is
0 only if no deviation from the protocol was seen. What is played and how it is judged stand in `rollout.remote`.
"""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rollout.errors import ConfigError

if TYPE_CHECKING:
    from cluster.remote_probe import Outcome
    from rollout.remote.conformance import Played

# The wire's models cost time to import; `rollout --help` needs none of them.
app = typer.Typer(help="Remote rollout servers.", no_args_is_help=True, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)


@app.callback()
def _root() -> None:
    """Remote rollout servers."""


@app.command()
def check(
    url: Annotated[str, typer.Argument(help="The rollout server's address, e.g. http://127.0.0.1:9000.")],
    generation: Annotated[str, typer.Option(help="A, A1 (A with the chat path) or B.")] = "A",
    api_key: Annotated[
        str | None, typer.Option(metavar="ENV", help="Environment variable that holds the server's key.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="DIR_OR_NAME", help="The trainer's tokenizer; A and A1 need it.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, max=3600.0, help="Seconds for one rollout.")] = 60.0,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the trainer listens; 0: a free port.")] = (
        "127.0.0.1:0"
    ),
    callback: Annotated[
        str | None, typer.Option(metavar="URL", help="By which the server reaches --listen, if by another.")
    ] = None,
    tool: Annotated[str | None, typer.Option(help="Tool that the script calls; the server's first if none.")] = None,
    tool_arguments: Annotated[
        str | None, typer.Option(metavar="JSON", help="Its arguments; made from its schema if none.")
    ] = None,
    tools_in_prompt: Annotated[
        bool, typer.Option(help="Whether the trainer writes the tools into the prompt.")
    ] = True,
    only: Annotated[list[str] | None, typer.Option(help="Only this scenario; several allowed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for a script.")] = False,
) -> None:
    """Play the trainer against a rollout server, and say in plain words what it does wrong."""
    from cluster.remote_probe import Target, check_server
    from rollout.remote.wire import Generation

    if generation not in get_args(Generation):
        raise ConfigError(f"--generation {generation}: use one of {', '.join(get_args(Generation))}")
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#]*)?", url):
        raise ConfigError(f"{url}: must be an address as http://127.0.0.1:9000")
    host, _, port = listen.rpartition(":")
    if not port.isdecimal() or int(port) > 65_535 or not host:
        raise ConfigError(f"--listen {listen}: must be HOST:PORT")
    key = None
    if api_key is not None and not (key := os.environ.get(api_key, "").strip()):
        raise ConfigError(f"--api-key {api_key}: this environment variable is not set")
    chat = None
    if tokenizer is not None and generation != "B":
        from rollout.rendering import load_renderer

        chat = load_renderer(tokenizer)
    target = Target(
        url=url.rstrip("/"), generation=cast(Generation, generation), api_key=key, chat=chat, timeout=timeout,
        listen=(host.strip("[]"), int(port)), callback=callback, tool=tool, tool_arguments=tool_arguments,
        tools_in_prompt=tools_in_prompt, only=tuple(only or ()),
    )  # fmt: skip

    def tell(played: Played) -> None:
        err.print(f"[dim]{played.scenario.name}: {played.seconds:.1f} s[/dim]", highlight=False)

    outcome = asyncio.run(check_server(target, (lambda _played: None) if as_json else tell))
    if as_json:
        out.print_json(data=outcome.to_json())
    else:
        show(outcome)
    if not outcome.ok:
        raise typer.Exit(1)


def show(outcome: Outcome) -> None:
    """Print what was found: the scenarios, then each check that failed with its reason."""
    from rollout.remote.conformance import CHECKS

    bad = {deviation.where for deviation in outcome.deviations if not deviation.advice}
    view = Table(box=None, header_style="dim", padding=(0, 2))
    for name in ("", "scenario", "what is played", "calls", "time"):
        view.add_column(name, justify="right" if name in ("calls", "time") else "left")
    for played in outcome.played:
        name = played.scenario.name
        mark = "[red]wrong[/red]" if name in bad else "[green]ok[/green]"
        view.add_row(mark, name, escape(played.scenario.about), str(len(played.calls)), f"{played.seconds:.1f} s")
    for name, why in outcome.skipped.items():
        view.add_row("[yellow]skipped[/yellow]", name, escape(why), "", "")
    out.print(view)
    for check_name in dict.fromkeys(deviation.check for deviation in outcome.deviations):
        out.print(f"\n[bold]{check_name}[/bold]  [dim]{escape(CHECKS[check_name])}[/dim]", highlight=False)
        for found in outcome.deviations:
            if found.check == check_name:
                mark = "[yellow]advice[/yellow]" if found.advice else "[red]wrong[/red] "
                out.print(f"  {mark} {found.where}: {escape(found.text)}", highlight=False, soft_wrap=True)
    wrong = sum(not deviation.advice for deviation in outcome.deviations)
    words = f"{wrong} deviations from generation {outcome.generation}" if wrong else (
        f"keeps generation {outcome.generation}, as far as {len(outcome.played)} scenarios show"
    )  # fmt: skip
    out.print(f"\n{outcome.url} [{'red' if wrong else 'green'}]{words}[/]", highlight=False)
