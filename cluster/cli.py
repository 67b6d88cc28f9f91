"""The command line: `rollout up|status|top|logs|down|run|eval|show|check|pull|tools|remote|demo`.

Invariant: a failure is one clear message on standard error and exit code 1; Ctrl-C ends with 130, keeps what has
finished, and leaves no process of ours behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import cli_watch, remote_check, state
from rollout.errors import RolloutError
from rollout.tasks import read_tasks
from rollout.trajectory_file import FILE_NAME, read_trajectories

if TYPE_CHECKING:
    from cluster.job import JobResult

app = typer.Typer(
    name="rollout",
    help="One YAML file becomes a Ray cluster that turns tasks into training-ready trajectories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console()
err = Console(stderr=True)

HOME = Path(__file__).resolve().parent.parent
"""The repository, where the demo's files are."""

Config = Annotated[Path, typer.Argument(help="The cluster's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override a field, e.g. --set engine.vllm.tensor_parallel_size=4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def main() -> None:
    """Entry point of the `rollout` command."""
    # SIGTERM ends like Ctrl-C, so that a supervisor's stop cleans up too.
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
        code: Any = 0
    except SystemExit as ending:
        # typer's own: usage errors (shown already), exit codes, and 130 for an interrupt.
        code = ending.code
    except KeyboardInterrupt:
        code = 130
    except RolloutError as error:
        err.print(f"[red]error[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        code = 1
    if code == 130:
        err.print("interrupted", style="yellow")
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@app.command()
def up(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Start a cluster and leave it running."""
    from cluster import deploy, launch

    loaded = _load(config, overrides, check_engine=False)
    with _steps() as report:
        started = launch.up(loaded, config, report, verify=lambda: _load(config, overrides))
    if notice := deploy.exposure_notice(loaded):
        err.print(notice, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if as_json:
        out.print_json(data={"name": started.name, "address": started.address, "logs": started.log_file})
    else:
        out.print(f"cluster [bold]{started.name}[/bold] is up; Ray at {started.address}", highlight=False)
        hints = (
            f"roll out:  rollout run {config} --tasks FILE.jsonl --out DIR\n"
            f"trainers:  RolloutClient({started.gateway!r})\n"
            f"stop it:   rollout down {started.name}"
        )
        out.print(hints, style="dim", highlight=False)


@app.command()
def down(
    name: Annotated[str | None, typer.Argument(help="The cluster's name; not needed where there is one.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Stop all clusters that `up` started.")] = False,
    forget: Annotated[bool, typer.Option(help="Drop its runs and weights too; the next `up` begins anew.")] = False,
) -> None:
    """Stop what `up` started, and nothing else on the machine. Runs go on with the next `up`, unless --forget."""
    from cluster import launch

    known = state.load_all()
    if not known:
        err.print("no cluster is known; nothing to stop")
        return
    chosen = known if every else [_one(known, name)]
    for cluster in chosen:
        with _steps() as report:
            ended = launch.down(cluster, report, forget=forget)
        err.print(f"cluster [bold]{cluster.name}[/bold] is down, {ended} processes ended", highlight=False)


@app.command()
def status(as_json: AsJson = False) -> None:
    """Show the known clusters: runs, workers, engines."""
    found = [_status_of(cluster) for cluster in state.load_all()]
    if as_json:
        out.print_json(data=found, default=str)
        return
    if not found:
        out.print("no cluster is known; start one with `rollout up CONFIG`")
    for cluster in found:
        _print_status(cluster)


@app.command()
def run(
    config: Config,
    tasks: Annotated[Path, typer.Option("--tasks", help="Task file, one JSON object a line.")],
    directory: Annotated[Path, typer.Option("--out", help="Directory for the trajectories.")],
    group_size: Annotated[int | None, typer.Option(min=1, max=1024, help="Sessions of each task.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first tasks of the file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the directory holds.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Roll out a task file: on the config's cluster if it is up, else on one that lives as long as this command."""
    loaded_tasks = read_tasks(tasks)[:limit]
    _run(config, overrides, loaded_tasks, directory, group_size, overwrite, as_json)


@app.command("eval")
def evaluate(
    config: Config,
    tasks: Annotated[Path, typer.Option("--tasks", help="Task file, one JSON object a line.")],
    n: Annotated[int, typer.Option("--n", min=1, max=1024, help="Attempts at each task.")],
    ks: Annotated[
        list[int] | None, typer.Option("--k", help="Of pass@k; several allowed. 1, 2, 4, … if none.")
    ] = None,
    directory: Annotated[Path, typer.Option("--out", help="Directory for trajectories and scores.")] = Path(
        "out/eval"
    ),
    pass_threshold: Annotated[float, typer.Option(help="The reward from which an attempt has passed.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first tasks of the file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what the directory holds.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Roll out every task n times and score it: pass@k and mean reward with an interval, overall and by tag."""
    from cluster import evaluate as scoring

    loaded_tasks = scoring.prepare(tasks, n=n, ks=ks, pass_threshold=pass_threshold, limit=limit)
    if overwrite:
        scoring.forget_scores(directory)
    result = _roll_out(config, overrides, loaded_tasks, directory, n, overwrite)
    found = scoring.evaluate_directory(directory, loaded_tasks, n=n, ks=ks, pass_threshold=pass_threshold)
    if as_json:
        out.print_json(data={"job": result.summary(), "evaluation": found.to_json()})
    else:
        out.print(scoring.evaluation_view(found))
        out.print(f"[dim]written to {directory}[/dim]", highlight=False, soft_wrap=True)
    if result.interrupted:
        raise KeyboardInterrupt
    if not found.overall.scored:
        raise RolloutError(f"nothing could be scored: {found.warnings[0]}")


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A trajectory file, or the directory of a run.")],
    trajectory: Annotated[str | None, typer.Option(help="Id of one, or an ending of it that is unique.")] = None,
    listing: Annotated[bool, typer.Option("--list", help="One line for each trajectory.")] = False,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer to use; the run's if not given.")] = None,
    full: Annotated[bool, typer.Option(help="Do not shorten the prompt.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a conversation with its tokens coloured by mask, its tool calls and timing."""
    from cluster.show import as_json as to_json
    from cluster.show import find, list_trajectories, show_trajectory

    table, info = read_trajectories(path)
    if listing:
        out.print(list_trajectories(table))
        return
    segments = find(table, trajectory)
    if as_json:
        out.print_json(to_json(segments))
    else:
        out.print(show_trajectory(segments, _decoder(model or info.get("model")), full=full))


@app.command()
def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Prove a config as far as that is possible without starting it."""
    from cluster.check import check_config

    with _steps() as report:
        report("asking vLLM about the engine's arguments")
        loaded = _load(config, overrides)
        report("loading environment and renderer")
        findings = check_config(loaded)
    if as_json:
        out.print_json(data=[{"what": f.what, "ok": f.ok, "detail": f.detail} for f in findings])
    else:
        for finding in findings:
            mark = "[green]ok[/green]   " if finding.ok else "[red]wrong[/red]"
            out.print(f"{mark} {finding.what}: {escape(finding.detail)}", highlight=False, soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def pull(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|CONFIG", help="A hub model (owner/name), or the YAML file that names it.")
    ],
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download a model before a start needs it. What is here already is not fetched again."""
    from cluster import pull as puller

    wanted = puller.resolve(target, revision, lambda path: _load(path, None, check_engine=False))
    try:
        with puller.view(err, wanted.model) as progress:
            pulled = puller.pull(wanted, progress)
    except KeyboardInterrupt:
        err.print("interrupted; what has come is kept, and the next pull goes on from there", style="yellow")
        puller.leave(130)
        raise
    happened, following = puller.closing_words(wanted, pulled)
    if as_json:
        out.print_json(data={"directory": str(pulled.directory), "fetched": pulled.fetched, "size": pulled.size})
    else:
        out.print(happened, markup=False, highlight=False, soft_wrap=True)
        out.print(following, style="dim", markup=False, highlight=False, soft_wrap=True)


@app.command()
def tools(
    http: Annotated[
        str | None,
        typer.Option("--http", metavar="HOST:PORT", help="Serve streamable HTTP there; a port alone is loopback's."),
    ] = None,
) -> None:
    """Serve the cluster's own tools (echo, time, exact arithmetic) over MCP: on stdio, or with --http on a port."""
    from cluster import tool_server
    from rollout.builtin_tools import builtin_tools

    def say(text: str) -> None:
        # Standard output is the protocol's.
        err.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    tool_server.serve(builtin_tools(), http, say)


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="The demo cluster's YAML file.")] = HOME / "configs" / "demo.yaml",
    directory: Annotated[Path, typer.Option("--out", help="Directory for the trajectories.")] = Path("out/demo"),
    tasks: Annotated[Path, typer.Option(help="Task file.")] = HOME / "examples" / "calculator" / "tasks.jsonl",
    limit: Annotated[int, typer.Option(min=1, help="How many tasks.")] = 64,
    group_size: Annotated[int, typer.Option(min=1, max=1024, help="Sessions of each task.")] = 8,
) -> None:
    """The whole thing once: start the demo cluster, roll out calculator tasks, look at them, stop everything."""
    if not config.exists():
        raise RolloutError(f"{config} does not exist: the demo needs a checkout of the repository")
    loaded_tasks = read_tasks(tasks)[:limit]
    _run(config, None, loaded_tasks, directory, group_size, overwrite=True, as_json=False, look=True)


cli_watch.register(app)
app.add_typer(remote_check.app, name="remote")


def _run(
    path: Path,
    overrides: list[str] | None,
    tasks: list[Any],
    directory: Path,
    group_size: int | None,
    overwrite: bool,
    as_json: bool,
    look: bool = False,
) -> None:
    from cluster.progress import closing_table

    result = _roll_out(path, overrides, tasks, directory, group_size, overwrite)
    if as_json:
        out.print_json(data=result.summary())
    else:
        table, info = read_trajectories(result.path)
        if look and table.num_rows:
            from cluster.show import find, show_trajectory

            out.print(show_trajectory(find(table, None), _decoder(info.get("model"))))
        out.print(closing_table(result, table))
        if look:
            out.print(f"[dim]look at others:  rollout show {result.path} --list[/dim]", highlight=False)
    if result.interrupted:
        raise KeyboardInterrupt


def _roll_out(
    path: Path,
    overrides: list[str] | None,
    tasks: list[Any],
    directory: Path,
    group_size: int | None,
    overwrite: bool,
) -> JobResult:
    """Roll out on the config's cluster if it is up, else on one that ends with this call."""
    from cluster import launch
    from cluster.job import run_tasks
    from cluster.progress import job_progress

    config = _load(path, overrides, check_engine=False)
    if config.environment is None:
        raise RolloutError(f"{path}: environment: is missing; name one as `environment: {{path: module:Class}}`")
    if (directory / FILE_NAME).exists() and not overwrite:
        raise RolloutError(f"{directory} already holds trajectories; choose another directory or --overwrite")
    cluster = state.load(config.name)
    ours = cluster is None or not launch.is_alive(cluster)
    try:
        if ours:
            with _steps() as report:
                cluster = launch.up(config, path, report, verify=lambda: _load(path, overrides), lasting=False)
        assert cluster is not None
        with launch.connected(cluster), job_progress(err) as on_progress:
            return run_tasks(
                config, tasks, directory, group_size=group_size, overwrite=overwrite, on_progress=on_progress
            )
    finally:
        if ours and (left := state.load(config.name)) is not None:
            with _steps() as report:
                report("stopping the cluster")
                launch.down(left, report)


def _load(path: Path, overrides: list[str] | None, *, check_engine: bool = True) -> Any:
    from cluster.config_file import load_config

    return load_config(path, overrides or (), check_engine=check_engine)


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    from cluster.progress import steps

    with steps(err) as report:
        yield report


def _one(known: list[state.ClusterState], name: str | None) -> state.ClusterState:
    names = ", ".join(cluster.name for cluster in known)
    if name is None:
        if len(known) == 1:
            return known[0]
        raise RolloutError(f"several clusters are known ({names}): name one, or give --all")
    for cluster in known:
        if cluster.name == name:
            return cluster
    raise RolloutError(f"no cluster is called {name!r}; known are: {names}")


def _decoder(model: str | None) -> Callable[[list[int]], str] | None:
    """The tokenizer of a local model directory; None, with a word, where there is none."""
    if model is None or not os.path.isdir(model):
        err.print("[dim]no tokenizer at hand: token ids are shown (give --model DIR)[/dim]")
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _status_of(cluster: state.ClusterState) -> dict[str, Any]:
    from cluster import deploy, launch

    base: dict[str, Any] = {
        "name": cluster.name, "address": cluster.address, "config": cluster.config_path, "logs": cluster.log_file,
        "alive": launch.is_alive(cluster), "ray_metrics": cluster.ray_metrics,
    }  # fmt: skip
    if not base["alive"]:
        return base
    import ray

    with launch.connected(cluster):
        try:
            told = ray.get(deploy.controller().status.remote(), timeout=10)
        except (RolloutError, ray.exceptions.RayError, TimeoutError) as error:
            return {**base, "error": (str(error) or type(error).__name__).splitlines()[0]}
    return {**base, **json.loads(json.dumps(told, default=dataclasses.asdict))}


def _print_status(found: dict[str, Any]) -> None:
    alive = "[green]up[/green]" if found["alive"] else "[red]dead[/red], `rollout down` forgets it"
    line = f"[bold]{found['name']}[/bold] {alive}  Ray {found['address']}  config {found['config']}"
    out.print(line, highlight=False)
    if "error" in found:
        out.print(f"  [red]{escape(found['error'])}[/red]")
    if not (engine := found.get("engine")):
        return
    out.print(
        f"  engine {engine['model']}  TP={engine['tensor_parallel_size']}  context {engine['max_model_len']}  "
        f"weights {found['policy_version']}", highlight=False, soft_wrap=True,
    )  # fmt: skip
    view = Table(box=None, header_style="dim", padding=(0, 2))
    for name in ("worker", "sessions", "loop lag p99", "memory", "replicas (in flight)"):
        view.add_column(name)
    for worker in found["workers"]:
        replicas = ", ".join(f"{name} ({n})" for name, n in worker["replicas"].items())
        view.add_row(
            worker["worker_id"], str(worker["sessions"]), f"{1000 * worker['loop_lag_p99_s']:.0f} ms",
            f"{worker['rss_mb']:.0f} MB", replicas,
        )  # fmt: skip
    out.print(view)
    for name, run in found["runs"].items():
        groups = ", ".join(f"{run[key]} {key}" for key in ("waiting", "running", "ready", "leased", "delivered"))
        out.print(
            f"  {escape(name)} {run['state']}  {run['submitted']} groups: {groups}, {sum(run['dropped'].values())} "
            f"dropped  sessions: {run['sessions_done']} done, {run['sessions_running']} running",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
