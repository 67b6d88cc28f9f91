"""load_config: every mistake is told with file, line, field and hint; no text ends in anything but ConfigError."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.config_file import MAX_FILE_BYTES, load_config
from rollout.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def load(folder: Path, text: str, *overrides: str, check_engine: bool = False) -> ClusterConfig:
    file = folder / "c.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides, check_engine=check_engine)


def problems(folder: Path, text: str, *overrides: str, check_engine: bool = False) -> list[str]:
    """The lines of the ConfigError, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text, *overrides, check_engine=check_engine)
    assert caught.value.__cause__ is None
    return str(caught.value).replace(f"{folder}{os.sep}", "").split("\n")


MODEL = "model: {path: ./model}\n"


def test_a_good_file(folder: Path) -> None:
    made = load(
        folder,
        MODEL
        + """
engine:
  device: cpu
  vllm: {max_model_len: 2048, seed: 1}
  env:
    TWO: 2
    MODE: 0755
    YES: yes
    DAY: 2026-01-02
sampling: {temperature: 1e-1, max_tokens: 64}
mcp_servers:
  local: {command: [server, --flag], cwd: ., env: {LEVEL: 3}}
  remote: {url: "https://host/mcp"}
limits:
""",
    )
    assert made.model.path == str(folder / "model") and made.model.name == "model" and made.model.is_local
    assert made.engine.env == {"TWO": "2", "MODE": "0755", "YES": "yes", "DAY": "2026-01-02"}
    assert made.sampling.temperature == 0.1
    assert made.mcp_servers["local"].command == ["server", "--flag"]
    assert made.mcp_servers["local"].env == {"LEVEL": "3"} and made.mcp_servers["local"].cwd == str(folder)
    assert load(folder, "\ufeff" + MODEL).model == made.model


def test_every_problem_is_told_at_once_in_the_order_of_lines(folder: Path) -> None:
    found = problems(
        folder,
        """\
name: Demo
modle: x
model:
  path: ./model
engine:
  replicas: two
  divice: cpu
  vllm: {model: x}
sampling:
  temprature: 1
  top_p: 3
""",
    )
    assert [line.split(": ")[:2] for line in found] == [
        ["c.yaml:1", "name"],
        ["c.yaml:2", "modle"],
        ["c.yaml:6", "engine.replicas"],
        ["c.yaml:7", "engine.divice"],
        ["c.yaml:8", "engine.vllm.model"],
        ["c.yaml:10", "sampling.temprature"],
        ["c.yaml:11", "sampling.top_p"],
    ]
    assert found[1].endswith("is not a known field; did you mean `model`?")
    assert found[2].endswith("must be a whole number (got text)")
    assert found[3].endswith("did you mean `device`?")
    assert found[5].endswith("did you mean `temperature`?")
    assert found[6].endswith("must be less than or equal to 1 (got 3)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("engine: {replicas: true}", "c.yaml:2: engine.replicas: must be a whole number (got true)"),
        ("engine: {replicas: '2'}", "c.yaml:2: engine.replicas: must be a whole number (got text)"),
        ("engine: {warmup: 1}", "c.yaml:2: engine.warmup: must be true or false (got 1)"),
        ("engine: {device: tpu}", "c.yaml:2: engine.device: must be 'cpu' or 'gpu' (got \"tpu\")"),
        ("engine: 3", "c.yaml:2: engine: must be a mapping (got 3)"),
        ("engine: [gpu]", "c.yaml:2: engine: must be a mapping (got a list)"),
        ("pythonpath: lib", "c.yaml:2: pythonpath: must be a list (got text)"),
        ("\nrun:\n  group_size: .nan", "c.yaml:4: run.group_size: must be a whole number (got NaN)"),
        ("pythonpath: [1]", "c.yaml:2: pythonpath.0: must be text (got 1)"),
        ("temperature: 1", "c.yaml:2: temperature: is not a known field; did you mean `sampling.temperature`?"),
        ("engine: {group_size: 1}", "engine.group_size: is not a known field; did you mean `run.group_size`?"),
        ("ray: {zzz: 1}", "is not a known field; known are address, num_cpus, object_store_memory_mb"),
        ("mcp_servers: {s: {comand: [x]}}", "mcp_servers.s.comand: is not a known field; did you mean `command`?"),
        ("mcp_servers: {s: {}}", "c.yaml:2: mcp_servers.s: an MCP server needs exactly one"),
        ("mcp_servers: {s: {command: [x], url: 'http://h'}}", "c.yaml:2: mcp_servers.s: an MCP server needs exactly"),
        ("environment: {args: {}}", "c.yaml:2: environment.path: is required"),
        ("environment: {path: nope}", "c.yaml:2: environment.path: must be module:Class"),
        ("sampling: {logit_bias: {abc: 1}}", "c.yaml:2: sampling.logit_bias.abc: its name must be a whole number"),
        ("sampling: {min_tokens: 9, max_tokens: 8}", "c.yaml:2: sampling: min_tokens (9) is more than"),
        ("engine:\n  env:\n    A: [1]", "c.yaml:4: engine.env.A: must be text or a number"),
        ("engine:\n  env:\n    A:", "c.yaml:4: engine.env.A: must be text or a number"),
        ("name: a\nengine:\nname: b", "c.yaml:4: name: is given twice, first on line 2; remove one of them"),
        ("engine:\n  vllm:\n    seed: 1\n    seed: 1", "c.yaml:5: engine.vllm.seed: is given twice, first on line 4"),
        ("run: &r {group_size: 2}\nray:\n  <<: *r", "c.yaml:4: ray: merging with `<<` is not supported"),
        ("? [a]\n: b", "c.yaml:2: a key must be a plain word"),
        ("name: !!python/object/apply:os.getcwd []", "c.yaml:2: name: has a tag (`!…`), which is not supported"),
        ("name: !x y", "c.yaml:2: name: has a tag"),
        ("run: {group_size: 99999999999999999999}", "c.yaml:2: run.group_size: is too large a number"),
        ('name: "\\0"', "c.yaml:2: name: holds a character that is not allowed"),
        ('engine: {env: {"a\\ud800": 1}}', "c.yaml:2: engine.env: a name with a character that is not allowed"),
        ("name: no", "c.yaml:2: name: must be text (got false)"),
        ("no: 1", "c.yaml:2: no: is not a known field"),
        ("name: !!int x", "c.yaml:2: name: is no int that can be read"),
        ("5: x", "c.yaml:2: 5: "),
        ("engine: {accelerator_type: H200, device: cpu}", "engine.accelerator_type: is of GPUs"),
        ("engine: {vllm: {logprobs_mode: raw_logits}}", "engine.vllm.logprobs_mode: must be processed_logprobs"),
        (
            "engine: {vllm: {max_model_len: 512}}",
            "c.yaml:2: engine.vllm.max_model_len: sampling.max_tokens (1024, the",
        ),
        (
            "engine: {vllm: {max_model_len: 512}}\nsampling:\n  max_tokens: 512",
            "c.yaml:4: sampling.max_tokens: sampling.max_tokens (512) must be less than",
        ),
        (
            "engine: {device: cpu, vllm: {tensor_parallel_size: 999}}",
            "c.yaml:2: engine.vllm.tensor_parallel_size: 999",
        ),
    ],
)
def test_one_problem_and_its_place(folder: Path, text: str, expected: str) -> None:
    found = problems(folder, MODEL + text + "\n")
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "c.yaml: must be a mapping"),
        ("# nothing\n", "c.yaml: must be a mapping"),
        ("- a\n", "c.yaml:1: must be a mapping"),
        ("just text", "c.yaml:1: must be a mapping"),
        ("name: x\n", "c.yaml: model: is required"),
        ("model:\n", "c.yaml:1: model: is required"),
        ("model: {}\n", "c.yaml:1: model.path: is required"),
        ("a: 1\n\tb: 2\n", "c.yaml:2: is not YAML"),
        ("a: 'open\n", "is not YAML"),
        ("a: [1\nb: 2\n", "is not YAML"),
        ("a: 1\n---\nb: 2\n", "c.yaml:2: is not YAML"),
        ("a: \x00", "c.yaml:1: a control character"),
        ("a: *nothing\n", "c.yaml:1: is not YAML: an alias"),
        ('a: "\\UFFFFFFFF"\n', "c.yaml: is not YAML: an escape sequence"),
        ("[" * 100_000, "c.yaml:1: more than 32 levels"),
        ("a: &x [*x, *x]\n", "more than 32 levels"),
        ("a: [" + "1," * 200_000 + "]", "values, with all aliases"),
    ],
)
def test_files_that_cannot_be_read_on(folder: Path, text: str, expected: str) -> None:
    found = problems(folder, text)
    assert len(found) == 1
    assert expected in found[0]


def test_a_bomb_of_aliases_is_refused(folder: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 12):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    assert "values, with all aliases" in problems(folder, text)[0]


def test_files_that_are_none(folder: Path) -> None:
    (folder / "large.yaml").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (folder / "binary.yaml").write_bytes(b"\xff\xfe")
    for name, expected in (
        ("large.yaml", "larger than 1024 KiB"),
        ("binary.yaml", "not UTF-8"),
        ("absent.yaml", "No such file"),
        ("model", "is a directory"),
        ("a\0b", "cannot be read"),
        ("n" * 300, "File name too long"),
    ):
        with pytest.raises(ConfigError, match=expected):
            load_config(folder / name, check_engine=False)


def test_aliases_are_allowed(folder: Path) -> None:
    made = load(folder, MODEL + "engine: {env: &e {A: 1}}\nmcp_servers: {s: {command: [x], env: *e}}\n")
    assert made.engine.env == made.mcp_servers["s"].env == {"A": "1"}


# Paths


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "c.yaml").write_text("model: {path: ../model}\npythonpath: ['..', .]\n")
    monkeypatch.chdir(folder.parent)
    made = load_config(Path(folder.name) / "sub" / "c.yaml", check_engine=False)
    assert made.model.path == str(folder / "model")
    assert made.pythonpath == [str(folder), str(folder / "sub")]
    assert load(folder, "model: {path: model}").model.path == str(folder / "model")
    assert load(folder, f"model: {{path: {folder}/model}}").model.path == str(folder / "model")
    monkeypatch.setenv("HOME", str(folder))
    assert load(folder, "model: {path: ~/model}").model.path == str(folder / "model")


def test_hub_names_stay(folder: Path) -> None:
    made = load(folder, "model: {path: Qwen/Qwen3-0.6B}")
    assert made.model.path == "Qwen/Qwen3-0.6B" and made.model.name == "Qwen3-0.6B" and not made.model.is_local


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("./absent", "absent is not a directory"),
        ("/absent/model", "/absent/model is not a directory"),
        (".", "has no config.json"),
        ("a/b/c", "neither a directory"),
        ("has space", "nor a hub name"),
        ("./" + "n" * 300, "is not a directory"),
    ],
)
def test_model_paths_that_lead_nowhere(folder: Path, path: str, expected: str) -> None:
    found = problems(folder, f"\nmodel:\n  path: {path}\n")
    assert len(found) == 1
    assert found[0].startswith("c.yaml:3: model.path: ") and expected in found[0]


def test_other_paths_that_lead_nowhere(folder: Path) -> None:
    found = problems(folder, MODEL + "pythonpath:\n- .\n- nope\nmcp_servers: {s: {command: [x], cwd: nope}}\n")
    assert found[0].startswith("c.yaml:4: pythonpath.1: ") and "is not a directory" in found[0]
    assert found[1].startswith("c.yaml:5: mcp_servers.s.cwd: ")


# Overrides


def test_overrides(folder: Path) -> None:
    made = load(
        folder,
        MODEL + "engine:\nsampling: {temperature: 0.5}\n",
        "engine.vllm.tensor_parallel_size=4",
        "engine.env.LEVEL=007",
        "sampling.temperature=1e-1",
        "sampling.stop=['a=b', c]",
        "environment={path: 'm:C', args: {x: 1}}",
        "environment.args.y=two",
        "ray.num_cpus=",
        "name=other",
    )
    assert made.engine.vllm == {"tensor_parallel_size": 4} and made.engine.env == {"LEVEL": "007"}
    assert made.sampling.temperature == 0.1 and made.sampling.stop == ["a=b", "c"]
    assert made.environment is not None and made.environment.args == {"x": 1, "y": "two"}
    assert made.ray.num_cpus is None and made.name == "other"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engine.replicas=x", "--set engine.replicas: must be a whole number (got text)"),
        ("engine.replica=2", "--set engine.replica: is not a known field; did you mean `replicas`?"),
        ("nosuch.x=2", "--set nosuch: is not a known field"),
        ("name.x=2", "--set name.x: name is a value and has no fields"),
        ("engine", "--set: engine: must be section.field=value"),
        ("=2", "--set: ''"),
        ("a..b=2", "must be section.field=value"),
        ("engine.vllm={a: 1", "--set engine.vllm: is not YAML"),
        ("engine.vllm={a: 1, a: 2}", "--set engine.vllm.a: is given twice"),
        ("engine.vllm.seed=&a [*a]", "--set engine.vllm.seed: more than 32 levels"),
        ("model.path=./nope", "nope is not a directory"),
        ("engine={replicas: 0}", "--set engine.replicas: must be greater than or equal to 1 (got 0)"),
    ],
)
def test_problems_of_overrides_name_the_override(folder: Path, override: str, expected: str) -> None:
    found = problems(folder, MODEL + "name: x\n", override)
    assert any(expected in line for line in found), found
    assert all(line.startswith("--set") for line in found)


def test_an_override_mends_the_file(folder: Path) -> None:
    assert load(folder, MODEL + "engine: {replicas: many}\n", "engine.replicas=2").engine.replicas == 2


# Secrets


@pytest.mark.parametrize(
    "text",
    [
        "engine: {env: {K: [hunter2]}}",
        "engine: {env: [K=hunter2]}",
        "engine: {env: hunter2}",
        "engine: {env: {K=hunter2: 1}}",
        "engine: {env: {K: *hunter2}}",
        "engine: {env: {K: !hunter2 x}}",
        "engine: {env: {K: 'hunter2}}",
        'engine: {env: {K: "hunter2 \\q"}}',
        "engine: {env: {K: @hunter2}}",
        "engine: {env: {K: %hunter2}}",
        "engine: {env: {K: hunter2, K: hunter2}}",
        "engine: {env: {K: hunter2}, replicas: 0}",
        "mcp_servers: {s: {url: 'http://h', headers: {A: [hunter2]}}}",
        "mcp_servers: {s: {url: 'http://h', headers: hunter2}}",
        "mcp_servers: {s: {headers: {A: hunter2}}}",
        "mcp_servers: {s: {command: [x], headers: {A: hunter2}}}",
        "mcp_servers: {s: {command: [x], env: {A: {b: hunter2}}}}",
        "mcp_servers: {s: {url: 'http://h', headers: {A: 'hunter2 ${UNSET_VARIABLE}'}}}",
        "mcp_servers: {s: {url: 'nope:hunter2@h'}}",
        "mcp_servers: {s: {url: 'http://[hunter2'}}",
    ],
)
def test_secrets_are_not_told(folder: Path, text: str) -> None:
    assert "hunter2" not in "\n".join(problems(folder, MODEL + text + "\n"))


def test_secrets_of_overrides_are_not_told(folder: Path) -> None:
    for override in (
        "engine.env.K=[hunter2]",
        "engine.env.K='hunter2",
        "engine.env.K=*hunter2",
        "engine.env=hunter2",
    ):
        assert "hunter2" not in "\n".join(problems(folder, MODEL, override))


def test_variables_of_mcp_servers_must_be_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = MODEL + "mcp_servers:\n  s:\n    url: http://h\n    headers:\n      Authorization: Bearer ${HOUSE_KEY}\n"
    monkeypatch.delenv("HOUSE_KEY", raising=False)
    assert problems(folder, text) == [
        "c.yaml:6: mcp_servers.s.headers.Authorization: needs the environment variable HOUSE_KEY, which is not set; "
        "export it first"
    ]
    monkeypatch.setenv("HOUSE_KEY", "hunter2")
    # It stays a reference: the secret enters no state file.
    assert load(folder, text).mcp_servers["s"].headers == {"Authorization": "Bearer ${HOUSE_KEY}"}


# vLLM's arguments (imports vLLM once)


def test_vllm_arguments_are_checked_with_their_lines(folder: Path) -> None:
    found = problems(
        folder,
        MODEL
        + """\
engine:
  max_num_seqs: 3
  vllm:
    max_modle_len: 1024
    gpu_memory_utilization: 5
    tensor_parallel_size: "2"
    dtype: bf16
""",
        "engine.vllm.enforce_eager=maybe",
        check_engine=True,
    )
    assert found == [
        '--set engine.vllm.enforce_eager: must be true or false (got "maybe")',
        "c.yaml:3: engine.max_num_seqs: is not a known field; did you mean `engine.vllm.max_num_seqs`?",
        "c.yaml:5: engine.vllm.max_modle_len: is no argument of vLLM; did you mean `max_model_len`?",
        "c.yaml:6: engine.vllm.gpu_memory_utilization: must be less than or equal to 1 (got 5)",
        "c.yaml:7: engine.vllm.tensor_parallel_size: must be a whole number of at least 1",
        "c.yaml:8: engine.vllm.dtype: must be one of auto, bfloat16, float, float16, float32, half "
        '(got "bf16"); did you mean `bfloat16`?',
    ]


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_shipped_configs_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    # The demo's model is made by a script, and may not be there yet.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / name).write_text((CONFIGS / name).read_text())
    model = tmp_path / "examples" / "calculator" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    made = load_config(tmp_path / "configs" / name)
    assert made.environment is not None and made.pythonpath == [str(tmp_path)]
    assert made.model.is_local == (name in ("demo.yaml", "learn.yaml"))
    assert made.limits.max_response_tokens < made.llm_engine_kwargs()["max_model_len"]
    sessions = made.workers.count * made.workers.sessions
    assert sessions <= made.engine.replicas * made.llm_engine_kwargs()["max_num_seqs"]


# Whatever the file holds


def fuzzed(folder: Path, text: str | bytes, *overrides: str) -> None:
    file = folder / "fuzz.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        made = load_config(file, overrides, check_engine=False)
    except ConfigError as error:
        str(error).encode()
    else:
        assert isinstance(made, ClusterConfig)


_bounded = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
_FIELDS = """path vllm env replicas device headers url command stop logit_bias max_tokens structured_outputs
json_schema args max_model_len a"""
_words = st.sampled_from([*ClusterConfig.model_fields, *_FIELDS.split()])
# One word per bit of YAML.
_SYNTAX = r"""
: - [ ] { } , &a *a !!int !!str !!set | > ' " # --- ... << ? %YAML \x \U00110000 1e5 0x_ 0b yes null ~ = 2026-99-99
.inf 1:30 !!binary !!timestamp !!omap ./model @ ` 99999999999999999999
"""
_yaml_bits = st.sampled_from(
    [*_SYNTAX.split(), *(f"{bit} " for bit in _SYNTAX.split()), " ", "  ", "\n", "\n  ", "\t"]
)
_plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=8), st.dates())
_trees: st.SearchStrategy[Any] = st.recursive(
    st.one_of(_plain, _words),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(_words | st.text() | st.integers(), inner, max_size=5)
    ),
    max_leaves=30,
)


@_bounded
@given(text=st.binary(max_size=300) | st.text(max_size=300))
def test_any_bytes(folder: Path, text: str | bytes) -> None:
    fuzzed(folder, text)


@_bounded
@given(bits=st.lists(_words | _yaml_bits, max_size=40))
def test_anything_like_yaml(folder: Path, bits: list[str]) -> None:
    fuzzed(folder, "".join(bits))


@_bounded
@given(tree=st.dictionaries(_words, _trees, max_size=6))
def test_any_tree(folder: Path, tree: Any) -> None:
    fuzzed(folder, yaml.safe_dump({"model": {"path": "./model"}} | tree, allow_unicode=True))


@_bounded
@given(
    overrides=st.lists(
        st.builds(
            lambda keys, bits: ".".join(keys) + "=" + "".join(bits),
            st.lists(_words, max_size=4),
            st.lists(_words | _yaml_bits, max_size=6),
        ),
        max_size=4,
    )
)
def test_any_overrides(folder: Path, overrides: list[str]) -> None:
    fuzzed(folder, MODEL, *overrides)
