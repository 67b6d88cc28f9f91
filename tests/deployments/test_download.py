"""Downloads of hub models: bytes as they come, and errors that say what to do. The hub's one call is a double."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from huggingface_hub.utils.tqdm import _create_progress_bar

from deployments import download as room
from deployments.download import DownloadError, DownloadProgress, download, engine_download

FILES = {"config.json": 100, "model-1.safetensors": 60_000, "model-2.safetensors": 40_000}
TOTAL = sum(FILES.values())


class FakeHub:
    """A TEST DOUBLE of huggingface_hub.snapshot_download: its progress bars, made and told as the real one does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.cached: set[str] = set()
        self.sizes: dict[str, int | None] = dict(FILES)
        self.offline = False
        self.failure: Exception | None = None
        self.calls: list[dict[str, Any]] = []
        self.begun_anew = 0

    def __call__(self, model: str, *, dry_run: bool = False, tqdm_class: type, **options: Any) -> Any:
        self.calls.append({"model": model, "dry_run": dry_run, **options})
        if dry_run:
            if self.offline or self.failure is not None:
                raise errors.DryRunError("Dry run cannot be performed as the repository cannot be accessed.")
            return [
                SimpleNamespace(filename=name, file_size=size, will_download=name not in self.cached)
                for name, size in self.sizes.items()
            ]
        if self.failure is not None:
            raise self.failure
        if not self.offline:
            self.fetch(tqdm_class)
        return str(self.directory)

    def fetch(self, tqdm_class: type) -> None:
        def bar(name: str, **options: Any) -> Any:
            return _create_progress_bar(
                cls=tqdm_class, log_level=30, name=name, total=0, initial=0, unit="B", unit_scale=True, **options
            )

        network = bar("huggingface_hub.snapshot_download.transfer", desc="Downloading bytes")
        disk = bar("huggingface_hub.snapshot_download", desc="Reconstructing (incomplete total...)")
        with tqdm_class(desc="Fetching 3 files", total=len(FILES)) as files:
            for name, size in FILES.items():
                if name in self.cached:
                    files.update(1)
                    continue
                disk.total += size
                network.total += size
                disk.refresh()
                if self.begun_anew:
                    disk.update(-self.begun_anew)
                for _ in range(10):
                    network.update(size // 20)
                    disk.update(size // 10)
                    disk.set_postfix_str(str(disk.format_dict.get("rate")), refresh=False)
                (self.directory / name).write_bytes(b"x" * size)
                files.update(1)
        disk.set_description("Reconstruction complete")
        disk.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setattr(room, "TELL_EVERY_S", 0.0)
    return FakeHub(tmp_path)


@pytest.fixture
def told() -> list[DownloadProgress]:
    return []


def whole(directory: Path) -> None:
    for name, size in FILES.items():
        (directory / name).write_bytes(b"x" * size)


def test_bytes_are_told_as_they_come_to_this_disk(hub: FakeHub, told: list[DownloadProgress], tmp_path: Path):
    assert download("owner/name", told.append, snapshot_download=hub, revision="v1") == tmp_path
    counts = [progress.bytes_downloaded for progress in told]
    assert counts[:3] == [10, 20, 30] and counts[-1] == TOTAL and counts == sorted(counts)
    assert {progress.bytes_total for progress in told} == {TOTAL}
    assert len(told) == 31 and any(progress.speed_mbps > 0 for progress in told)
    assert hub.calls[1]["revision"] == "v1" and "*.safetensors" in hub.calls[1]["allow_patterns"]


def test_files_of_an_earlier_download_count_as_here(hub: FakeHub, told: list[DownloadProgress]):
    hub.cached = {"model-1.safetensors"}
    whole(hub.directory)
    download("owner/name", told.append, snapshot_download=hub)
    assert told[0].bytes_downloaded == 60_010 and told[-1].bytes_downloaded == TOTAL
    hub.cached, again = set(FILES), []
    download("owner/name", again.append, snapshot_download=hub)
    assert [(progress.bytes_downloaded, progress.bytes_total) for progress in again] == [(TOTAL, TOTAL)]


def test_a_file_that_is_begun_anew_takes_nothing_back(hub: FakeHub, told: list[DownloadProgress]):
    hub.begun_anew = 5_000
    download("owner/name", told.append, snapshot_download=hub)
    counts = [progress.bytes_downloaded for progress in told]
    assert counts == sorted(counts) and counts[0] == 0


def test_progress_is_not_told_more_often_than_a_person_reads(
    hub: FakeHub, told: list[DownloadProgress], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(room, "TELL_EVERY_S", 60.0)
    download("owner/name", told.append, snapshot_download=hub)
    assert [progress.bytes_downloaded for progress in told] == [10, TOTAL]


def test_the_speed_is_of_the_last_seconds_in_megabits(monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now[0]))
    told: list[DownloadProgress] = []
    meter = room._Meter(told.append, 0, None)
    for second in range(1, 31):
        now[0] = float(second)
        meter.add(1_000_000 if second <= 15 else 0)
    assert told[9].speed_mbps == told[14].speed_mbps == 8.0
    assert told[17].speed_mbps == pytest.approx(8.0 * 2 / 5) and told[29].speed_mbps == 0.0


def test_a_total_that_the_hub_does_not_say_is_null_until_the_end(hub: FakeHub, told: list[DownloadProgress]):
    hub.sizes["config.json"] = None
    download("owner/name", told.append, snapshot_download=hub)
    assert told[0].bytes_total is None and told[-1] == DownloadProgress(TOTAL, TOTAL, told[-1].speed_mbps)


def test_without_the_hub_a_whole_copy_will_do(hub: FakeHub, told: list[DownloadProgress]):
    hub.offline = True
    whole(hub.directory)
    assert download("owner/name", told.append, snapshot_download=hub) == hub.directory
    assert [(progress.bytes_downloaded, progress.bytes_total) for progress in told] == [(TOTAL, TOTAL)]


def test_threads_do_not_lose_bytes():
    told: list[DownloadProgress] = []
    meter = room._Meter(told.append, 0, 80_000)
    add = [threading.Thread(target=lambda: [meter.add(10) for _ in range(1_000)]) for _ in range(8)]
    for thread in add:
        thread.start()
    for thread in add:
        thread.join(10)
    assert meter._bytes == 80_000


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.LocalEntryNotFoundError("x"), r"not \(or not wholly\) on this machine.*HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled("x"), "the hub cannot be reached"),
        (errors.RepositoryNotFoundError("x", response=RESPONSE), "has no model owner/name.*HF_TOKEN"),
        (errors.GatedRepoError("x", response=RESPONSE), "is gated; accept its terms"),
        (errors.RevisionNotFoundError("x", response=RESPONSE), "no revision v1"),
        (errors.HFValidationError("x"), "no name of a hub model"),
        (OSError(28, "No space left on device"), "could not be written.*No space left.*HF_HOME"),
        (RuntimeError("odd"), "could not be downloaded: RuntimeError: odd"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_say_what_to_do(hub: FakeHub, told: list[DownloadProgress], failure: Exception, message: str):
    hub.failure = failure
    with pytest.raises(DownloadError, match=message) as caught:
        download("owner/name", told.append, snapshot_download=hub, revision="v1")
    assert "owner/name" in str(caught.value) and caught.value.category == "download"
    assert told == [], "nothing came"


def test_a_model_without_safetensors_is_refused(hub: FakeHub, told: list[DownloadProgress]):
    hub.offline = True
    (hub.directory / "model.bin").touch()
    with pytest.raises(DownloadError, match="holds no safetensors"):
        download("owner/name", told.append, snapshot_download=hub)


def test_the_real_call_without_network_and_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="hub cannot be reached"):
        download("owner/name", lambda _: None)
    with pytest.raises(DownloadError, match="no name of a hub model"):
        download("owner/name/more", lambda _: None)


# As an engine needs it


@pytest.mark.parametrize(
    ("load_format", "taken", "total"),
    [("auto", "consolidated", 70_100), ("mistral", "consolidated", 70_100), ("hf", "model", TOTAL)],
)
def test_of_two_copies_of_the_weights_the_one_is_fetched_that_vllm_reads(
    hub: FakeHub, told: list[DownloadProgress], load_format: str, taken: str, total: int
):
    hub.sizes["consolidated-1.safetensors"] = 70_000
    whole(hub.directory)
    hub.cached = set(FILES)
    download("owner/name", told.append, snapshot_download=hub, load_format=load_format)
    patterns = {name: hub.calls[-1][name] for name in ("allow_patterns", "ignore_patterns")}
    weights = [name for name in filter_repo_objects(hub.sizes, **patterns) if name.endswith(".safetensors")]
    assert weights and all(name.startswith(taken) for name in weights)
    assert told[-1].bytes_total == total


def test_an_engines_download_goes_where_vllm_looks(hub: FakeHub, told: list[DownloadProgress]):
    arguments = {"revision": "v1", "hf_token": "t", "download_dir": "/big", "max_model_len": 4096}
    fetch = engine_download("owner/name", arguments, hub)
    assert fetch is not None and fetch(told.append) == hub.directory and told[-1].bytes_downloaded == TOTAL
    for call in hub.calls:
        assert (call["revision"], call["token"], call["cache_dir"]) == ("v1", "t", "/big")
    fetch = engine_download("owner/name", {"hf_token": True}, hub)
    assert fetch is not None and fetch(told.append)
    assert hub.calls[-1]["token"] is None and "cache_dir" not in hub.calls[-1]


def test_what_vllm_fetches_otherwise_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").touch()
    for model in (str(tmp_path), str(tmp_path / "model.gguf"), "s3://bucket/model", "owner/name:Q4_K_M"):
        assert engine_download(model, {}) is None
    for chosen in ("pt", "gguf", "dummy", "runai_streamer", "bitsandbytes"):
        assert engine_download("owner/name", {"load_format": chosen}) is None
    assert engine_download("owner/name", {"load_format": None}) is not None
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert engine_download("owner/name", {}) is None
