"""The commands that look: `rollout top`, `rollout logs` and `rollout ui`.

Invariant: neither needs Ray or changes anything. Looking is ended by Ctrl-C, which is no failure: the exit code is 0.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from rollout.errors import RolloutError

if TYPE_CHECKING:
    from cluster.logs import Entry

out = Console()
err = Console(stderr=True)

ClusterName = Annotated[
    str | None, typer.Argument(metavar="[CLUSTER]", help="Its name; not needed where there is one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script, one object a line.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(top)
    app.command()(logs)
    app.command()(ui)


def ui(
    path: Annotated[Path, typer.Argument(help="A trajectory file, or a directory of `rollout run`.")],
    model: Annotated[
        str | None, typer.Option(help="Directory or hub name of the tokenizer; default: as the file says.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: a free one.")] = None,
) -> None:
    """Look at trajectories of a file in a browser: the page that a cluster has at /ui."""
    from cluster import ui_file

    ui_file.serve(str(path), model, port)


def top(
    name: ClusterName = None,
    address: Annotated[
        str | None, typer.Option(help="The gateway's address, for a cluster that runs elsewhere.")
    ] = None,
    every: Annotated[float, typer.Option(min=0.2, max=3600.0, help="Seconds between two looks.")] = 2.0,
    single: Annotated[bool, typer.Option("--once", help="Print one frame and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a cluster: runs, sessions, replicas, workers. A gateway with keys wants one in ROLLOUT_API_KEY."""
    from cluster import top as watching
    from cluster.top_frame import view

    watcher = watching.Watcher(watching.choose(name, address), api_key=watching.key_from_environment())
    try:
        if single:
            figures = watching.once(watcher, every)
            if as_json:
                _print_line(json.dumps(figures))
            else:
                out.print(view(figures, out.width))
            if figures["problems"] and not figures["runs"] and figures["policy_version"] is None:
                raise RolloutError(f"nothing could be asked: {figures['problems'][0]}")
            return
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                for figures in watching.frames(watcher, every):
                    _print_line(json.dumps(figures))
            elif out.is_terminal:
                watching.live(watcher, out, every)
            else:
                for figures in watching.frames(watcher, every):
                    out.print(view(figures, out.width), "")
    finally:
        watcher.close()


def logs(
    name: ClusterName = None,
    component: Annotated[
        list[str] | None,
        typer.Option(
            help="controller, worker, engine, gateway, front, or one of many, as worker-3; several allowed."
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="The least that is shown.")
    ] = "debug",
    trajectory: Annotated[str, typer.Option(metavar="ID", help="Of this trajectory; an ending is enough.")] = "",
    correlation: Annotated[str, typer.Option(metavar="ID", help="Of this request; a beginning is enough.")] = "",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="The newest so many; 0 for all.")] = 200,
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Where the log files are, if `up` does not know it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the logs of a cluster's processes, in the order of time. They are there after it has ended, too."""
    from cluster import logs as reading

    if directory is not None and not directory.is_dir():
        raise RolloutError(f"--dir {directory} is no directory")
    found = directory or reading.directory_of(reading.choose(name))
    reader = reading.LogReader(found, reading.Wanted(level, tuple(component or ()), trajectory, correlation))
    with contextlib.suppress(KeyboardInterrupt):
        _print(reading.read(reader, lines or None), as_json)
        if follow:
            _print(reading.follow(reader), as_json)
    if reader.damaged:
        err.print(f"{reader.damaged} lines were no records, and were left out", style="yellow")


def _print(entries: Iterable[Entry], as_json: bool) -> None:
    from cluster.logs import rendered

    for entry in entries:
        if as_json:
            _print_line(json.dumps(entry, ensure_ascii=False))
        else:
            out.print(rendered(entry), soft_wrap=True, highlight=False)


def _print_line(text: str) -> None:
    # Not through rich, which would wrap it. A lone surrogate, which JSON can hold and UTF-8 cannot, is spelled out.
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode(errors="backslashreplace") + b"\n")
    sys.stdout.flush()
