"""`rollout pull`: what a target means, bytes as they come, and what is said at the end. The hub is a double."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from rich.console import Console

from cluster import cli
from cluster import pull as room
from cluster.pull import Pulled, Wanted, closing_words, in_bytes, pull, resolve, speed, view
from deployments.download import DownloadError, DownloadProgress
from rollout.errors import ConfigError
from tests.conftest import MODEL, ROOT

FILES = {"config.json": 1_000, "model.safetensors": 1_999_000}
TOTAL = sum(FILES.values())


class HubDouble:
    """A TEST DOUBLE of huggingface_hub.snapshot_download: writes FILES into a directory in ten pieces each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: list[dict[str, Any]] = []
        self.failure: Exception | None = None

    def __call__(self, model: str, *, dry_run: bool = False, tqdm_class: type, **options: Any) -> Any:
        self.calls.append({"model": model, "dry_run": dry_run, **options})
        if self.failure is not None:
            raise self.failure
        if dry_run:
            return [SimpleNamespace(filename=name, file_size=n, will_download=True) for name, n in FILES.items()]
        bar = tqdm_class(name="huggingface_hub.snapshot_download", unit="B", total=TOTAL)
        for name, count in FILES.items():
            (self.directory / name).write_bytes(b"x" * count)
            for _ in range(10):
                bar.update(count // 10)
        return str(self.directory)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    directory = tmp_path / "hub" / "snapshot"
    directory.mkdir(parents=True)
    double = HubDouble(directory)
    monkeypatch.setattr("huggingface_hub.snapshot_download", double)
    return double


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: org/tiny, revision: v1}\n")
    return path


@pytest.fixture
def rollout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs the command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rollout", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


# The command


def test_a_hub_model_is_pulled_and_the_next_step_is_told(rollout: Any, hub: HubDouble):
    code, out, err = rollout("pull", "org/tiny", "--revision", "v2")
    assert code == 0
    assert out == (
        f"org/tiny at revision v2 is on this machine: 2.0 MB in {hub.directory}\n"
        "name it in a config:  model: {path: org/tiny, revision: v2}\n"
        "prove that:  rollout check CONFIG\n"
    )
    assert err.splitlines()[-1].startswith("org/tiny  2.0 MB of 2.0 MB, ") and err.count("2.0 MB of 2.0 MB") == 1
    assert [call["dry_run"] for call in hub.calls] == [True, False]
    assert {call["revision"] for call in hub.calls} == {"v2"}


def test_a_config_brings_its_model_and_revision(rollout: Any, hub: HubDouble, config: Path):
    code, out, _ = rollout("pull", config)
    assert code == 0 and {(call["model"], call["revision"]) for call in hub.calls} == {("org/tiny", "v1")}
    assert out.splitlines() == [
        f"org/tiny at revision v1 is on this machine: 2.0 MB in {hub.directory}",
        f"start it:  rollout up {config}",
    ]


def test_for_a_local_directory_there_is_nothing_to_do(rollout: Any, hub: HubDouble, config: Path):
    code, out, err = rollout("pull", MODEL)
    assert (code, err, hub.calls) == (0, "", [])
    assert out.splitlines()[0] == f"{MODEL} is a directory of this machine; there is nothing to download"
    assert f"model: {{path: {MODEL}}}" in out
    config.write_text(f"model: {{path: {MODEL}}}\n")
    code, out, _ = rollout("pull", config)
    assert (code, hub.calls) == (0, []) and out.endswith(f"start it:  rollout up {config}\n")


def test_a_script_gets_json(rollout: Any, hub: HubDouble):
    code, out, _ = rollout("pull", "org/tiny", "--json")
    assert code == 0
    assert json.loads(out) == {"directory": str(hub.directory), "fetched": True, "size": TOTAL}
    assert json.loads(rollout("pull", MODEL, "--json")[1]) == {
        "directory": str(MODEL),
        "fetched": False,
        "size": None,
    }


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (
            errors.LocalEntryNotFoundError("offline"),
            "the hub cannot be reached; check the network and HF_HUB_OFFLINE",
        ),
        (OSError(28, "No space left on device"), "could not be written to this disk"),
        (errors.HFValidationError("x"), "is no name of a hub model"),
    ],
)
def test_a_failure_is_one_message_and_nothing_is_said_to_be_there(
    rollout: Any, hub: HubDouble, failure: Exception, words: str
):
    hub.failure = failure
    code, out, err = rollout("pull", "org/tiny")
    assert (code, out) == (1, "")
    assert err.startswith("error ") and words in err and err.count("\n") == 1


def test_offline_and_without_a_copy_the_real_hub_client_says_so(tmp_path: Path):
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "cluster", "pull", "org/tiny"],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error org/tiny is not (or not wholly) on this machine")


def test_an_interrupt_ends_at_once_although_the_download_does_not(tmp_path: Path):
    """The double downloads in threads that do not hear of it, as the real one does."""
    script = textwrap.dedent("""
        import sys, time
        from concurrent.futures import ThreadPoolExecutor
        import huggingface_hub
        def double(model, *, dry_run=False, **_):
            if dry_run:
                return []
            print("begun", flush=True)
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(time.sleep, [120, 120]))
        huggingface_hub.snapshot_download = double
        sys.argv = ["rollout", "pull", "org/tiny"]
        from cluster import cli
        cli.main()
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (130, "")
        assert "interrupted; what has come is kept" in err and "Traceback" not in err
        assert time.monotonic() - started < 10
    finally:
        process.kill()
        process.wait()


# What a target means


def no_config(_path: Path) -> Any:
    raise AssertionError("it was read as a config")


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny", None, no_config) == Wanted("org/tiny")
    assert resolve("org/tiny", "v1", no_config) == Wanted("org/tiny", "v1")
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    (tmp_path / "org" / "tiny" / "config.json").write_text("{}")
    assert resolve("org/tiny", None, no_config) == Wanted(str(tmp_path / "org" / "tiny"))
    for name in ("missing.yaml", "missing.yml"):
        with pytest.raises(AssertionError, match="read as a config"):
            resolve(name, None, no_config)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("./models/tiny", "./models/tiny: no such directory or config; a hub model is owner/name"),
        ("/models/tiny", "no such directory or config"),
        ("~/models/tiny", "no such directory or config"),
        ("", "the target is empty"),
        (".", "has no config.json, so it is no model directory"),
    ],
)
def test_targets_that_mean_nothing(target: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        resolve(target, None, no_config)
    assert words in str(caught.value)


def test_a_revision_is_of_a_hub_model_alone(config: Path):
    with pytest.raises(ConfigError, match=r"--revision is for a model of the hub, and .*write model.revision in it"):
        resolve(str(config), "v2", no_config)
    with pytest.raises(ConfigError, match="is a directory of this machine"):
        resolve(str(MODEL), "v2", no_config)


def test_the_files_come_to_where_the_engines_look(hub: HubDouble, tmp_path: Path):
    def options(env: dict[str, str]) -> dict[str, Any]:
        pull(Wanted("org/tiny", env=env), lambda _: None, hub)
        return {name: hub.calls[-1].get(name) for name in ("cache_dir", "endpoint", "token")}

    assert options({}) == {"cache_dir": None, "endpoint": None, "token": None}
    assert options({"HF_HOME": "/big"})["cache_dir"] == "/big/hub"
    assert options({"HF_HOME": "/big", "HF_HUB_CACHE": "/other"})["cache_dir"] == "/other"
    assert options({"HF_ENDPOINT": "https://mirror.example", "HF_TOKEN": "t"}) == {
        "cache_dir": None, "endpoint": "https://mirror.example", "token": "t",
    }  # fmt: skip


def test_what_the_download_raises_comes_through_the_thread(hub: HubDouble):
    hub.failure = RuntimeError("odd")
    with pytest.raises(DownloadError, match="RuntimeError: odd"):
        pull(Wanted("org/tiny"), lambda _: None, hub)


def test_a_cluster_on_other_machines_is_told_of():
    wanted = Wanted("org/tiny", config=Path("c.yaml"), elsewhere=True)
    _, following = closing_words(wanted, Pulled(Path("/hub"), True, 10))
    assert following.startswith("start it:  rollout up c.yaml\nother machines of the Ray cluster do not have it")
    _, following = closing_words(wanted, Pulled(Path("/hub"), False))
    assert following == "start it:  rollout up c.yaml"


# What is shown


def test_a_bar_has_bytes_and_speed():
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    with view(console, "org/[tiny]") as progress:
        progress(DownloadProgress(500_000_000, 2_000_000_000, 800.0))
        progress(DownloadProgress(1_000_000_000, 2_000_000_000, 400.0))
    text = screen.getvalue()
    assert "org/[tiny]" in text and "1.0/2.0 GB" in text and "50.0 MB/s" in text


def test_lines_come_now_and_then_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0]))
    screen = io.StringIO()
    with view(Console(file=screen, width=40), "org/tiny") as progress:
        for second in range(11):
            now[0] = 100.0 + second
            progress(DownloadProgress(second * 1_000_000, None, 8.0))
        progress(DownloadProgress(12_000_000, 12_000_000, 8.0))
        progress(DownloadProgress(12_000_000, 12_000_000, 8.0))
    assert screen.getvalue().splitlines() == [
        "org/tiny  0 bytes of an unknown size, 1.0 MB/s",
        "org/tiny  5.0 MB of an unknown size, 1.0 MB/s",
        "org/tiny  10.0 MB of an unknown size, 1.0 MB/s",
        "org/tiny  12.0 MB of 12.0 MB, 1.0 MB/s",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
     (13_761_300_000, "13.8 GB"), (2_500_000_000_000, "2.5 TB")],
)  # fmt: skip
def test_bytes_as_people_read_them(count: int, text: str):
    assert in_bytes(count) == text
    assert speed(DownloadProgress(0, None, 8.0)) == "1.0 MB/s"
