"""Configuration: arguments over environment over defaults, errors that name what is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpcray.config import (
    ENVIRONMENT,
    OTHER_VARIABLES,
    InitConfig,
    make_config,
    unknown_variables,
    without_password,
)


def test_defaults_and_round_trips() -> None:
    config = make_config(environment={})
    assert config == InitConfig()
    assert (config.start_timeout_s, config.log_to_driver) == (300, True)
    for codec in (msgspec.json, msgspec.msgpack):
        assert codec.decode(codec.encode(config), type=InitConfig) == config


def test_the_environment_speaks_where_arguments_do_not() -> None:
    environment = {
        "HPCRAY_NUM_CPUS": "3", "HPCRAY_NUM_GPUS": "0", "HPCRAY_OBJECT_STORE_BYTES": "1000000",
        "HPCRAY_MEMORY_BYTES": "2e9", "HPCRAY_NAMESPACE": "n", "HPCRAY_LOG_TO_DRIVER": "0",
        "HPCRAY_PRELOAD": "a, b.c,", "HPCRAY_REDIS_URL": "redis://h",
        "HPCRAY_START_TIMEOUT_S": "7.5", "HPCRAY_LABELS": "zone=a", "HPCRAY_COLOR_PREFIX": "1",
        "HPCRAY_DEDUP_LOGS": "0", "HPCRAY_DEDUP_LOGS_AGG_WINDOW_S": "2",
        "HPCRAY_DEDUP_LOGS_ALLOW_REGEX": "always", "HPCRAY_DEDUP_LOGS_SKIP_REGEX": "never",
    }
    assert set(environment) == set(ENVIRONMENT)
    config = make_config(environment=environment)
    assert config == InitConfig(
        num_cpus=3.0, num_gpus=0.0, object_store_memory_bytes=1_000_000,
        memory_bytes=2_000_000_000, namespace="n", log_to_driver=False, preload=["a", "b.c"],
        redis_url="redis://h", start_timeout_s=7.5, color_prefix="1",
        log_rules={"enabled": False, "window_s": 2.0, "keep": "always", "skip": "never"})
    assert make_config(num_cpus=1, log_to_driver=True, environment=environment).num_cpus == 1
    assert make_config(environment=dict.fromkeys(ENVIRONMENT, "")) == InitConfig()


def test_rays_variables_for_output_count_too() -> None:
    rays = {"RAY_DEDUP_LOGS": "0", "RAY_COLOR_PREFIX": "0", "RAY_LOG_TO_DRIVER": "0"}
    config = make_config(environment=rays)
    assert (config.log_rules, config.color_prefix, config.log_to_driver) == (
        {"enabled": False}, "0", False)
    assert make_config(environment={**rays, "HPCRAY_DEDUP_LOGS": "1"}).log_rules == {}
    assert make_config(environment={"RAY_NUM_CPUS": "7"}).num_cpus is None


def test_a_variable_that_nobody_reads_is_named() -> None:
    known = dict.fromkeys([*ENVIRONMENT, *OTHER_VARIABLES, "HPCRAY_TEST_X", "PATH"], "1")
    assert unknown_variables(known) == []
    assert unknown_variables({**known, "HPCRAY_NUM_CPU": "1", "HPCRAY_XYZZY": ""}) == [
        "the environment has HPCRAY_NUM_CPU, which hpcray does not know and ignores. "
        "Did you mean HPCRAY_NUM_CPUS?",
        "the environment has HPCRAY_XYZZY, which hpcray does not know and ignores."]


def test_every_variable_in_the_code_is_known() -> None:
    root = Path(__file__).resolve().parents[2]
    files = [*(root / "hpcray").rglob("*.py"), *(root / "slurm").iterdir(),
             *(root / "benchmarks").glob("*.py")]
    named = {name for file in files for name in re.findall(r"HPCRAY_[A-Z_]+[A-Z]",
                                                           file.read_text())}
    assert {name for name in named if not name.startswith("HPCRAY_TEST")} == {
        *ENVIRONMENT, *OTHER_VARIABLES}


@pytest.mark.parametrize(("name", "value"), [
    ("HPCRAY_DEDUP_LOGS_SKIP_REGEX", "("), ("HPCRAY_DEDUP_LOGS_AGG_WINDOW_S", "-1"),
    ("HPCRAY_NUM_CPUS", "many"), ("HPCRAY_NUM_CPUS", "-1"), ("HPCRAY_NUM_CPUS", "nan"),
    ("HPCRAY_OBJECT_STORE_BYTES", "1.5"), ("HPCRAY_OBJECT_STORE_BYTES", "1GB"),
    ("HPCRAY_LABELS", "zone"), ("HPCRAY_LABELS", "{"), ("HPCRAY_LABELS", "ray.io/node-id=x"),
    ("HPCRAY_LOG_TO_DRIVER", "maybe"), ("HPCRAY_START_TIMEOUT_S", "0"),
])
def test_a_wrong_variable_is_named(name: str, value: str) -> None:
    with pytest.raises(ValueError, match="(?i)" + name.removeprefix("HPCRAY_")):
        make_config(environment={name: value})


def test_a_size_with_a_unit_says_how_to_write_it() -> None:
    with pytest.raises(ValueError, match="'8GB' in the environment is not a number of bytes; 8 "):
        make_config(environment={"HPCRAY_OBJECT_STORE_BYTES": "8GB"})


@pytest.mark.parametrize(("arguments", "error", "says"), [
    ({"num_cpus": "2"}, TypeError, "num_cpus"),
    ({"num_gpus": -1}, ValueError, "num_gpus"),
    ({"object_store_memory_bytes": 1.5}, TypeError, "object_store_memory"),
    ({"object_store_memory_bytes": 0}, ValueError, "object_store_memory"),
    ({"object_store_memory_bytes": 10}, ValueError, "object_store_memory must be at least 4096"),
    ({"resources": {"CPU": 2}}, ValueError, "num_cpus"),
    ({"resources": {"": 2}}, TypeError, "non-empty"),
    ({"preload": "numpy"}, TypeError, "list of module names"),
    ({"namespace": ""}, ValueError, "namespace"),
    ({"labels": {"a": 1}}, TypeError, "labels"),
    ({"runtime_env": {"conda": "x"}}, NotImplementedError, "'conda'"),
    ({"labels": {"a b": "c"}}, ValueError, "a b"),
    ({"labels": {"ray.io/node-id": "c"}}, ValueError, "node's own"),
    ({"resources": {"a@b": 1}}, ValueError, "a@b"),
    ({"runtime_env": {"env_vars": {"A=B": "c"}}}, ValueError, "A=B"),
])
def test_a_wrong_argument_is_named(arguments: dict[str, Any], error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        make_config(**arguments, environment={})


def test_the_password_is_never_shown() -> None:
    config = make_config(redis_url="rediss://user:secret@host:1/0", environment={})
    for text in (repr(config), str(config), f"{config}", config.public_redis_url,
                 str(list(config.__rich_repr__()))):
        assert "secret" not in text and "host:1" in text
    assert "secret" not in without_password("redis://:secret@h")
    assert "secret" not in without_password("redis://:secret@[h")
    assert without_password("redis://h:6379/0") == "redis://h:6379/0"
