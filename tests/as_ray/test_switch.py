"""`import ray` under the switch, with a pretended ray: a folder that looks like an installed one.

What needs Ray's real libraries is in test_libraries.py.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = "import hpcray; hpcray.as_ray()\n"


class Site:
    """A folder of installed packages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, text: str = "") -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def install_ray(self, version: str) -> None:
        self.write("ray/__init__.py", "raise RuntimeError('the real ray was imported')\n")
        self.write(f"ray-{version}.dist-info/METADATA",
                   f"Metadata-Version: 2.1\nName: ray\nVersion: {version}\n")

    def run(self, source: str, *, switch: bool = True, command: tuple[str, ...] = ("-c",),
            **environ: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(self.folder), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *command, (SWITCH if switch else "") + source], text=True,
            capture_output=True, timeout=60, cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, **environ})

    def good(self, source: str, **more: str) -> str:
        done = self.run(source, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def bad(self, source: str, **more: str) -> str:
        done = self.run(source, **more)
        assert done.returncode != 0, done.stdout
        return done.stderr


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folder = tmp_path / "site-packages"  # what is there counts as installed
    folder.mkdir()
    return Site(folder)


@pytest.fixture
def with_ray(site: Site) -> Site:
    site.install_ray("2.60.0")
    return site


def test_the_core_is_hpcray_s_under_ray_s_name(site: Site) -> None:
    site.good("""
import ray, sys
import ray.util.queue
from ray.util.queue import Queue
from ray.util import ActorPool, placement_group
from ray.exceptions import RayTaskError
from ray import ObjectRef
import hpcray.util.queue
assert ray.get is hpcray.get and ray.ObjectRef is ObjectRef is hpcray.ObjectRef
assert Queue is hpcray.util.queue.Queue and ray.util.queue is hpcray.util.queue
assert ray.util.queue.__spec__.name == "hpcray.util.queue"
assert RayTaskError is hpcray.exceptions.RayTaskError
assert ray.__version__ and ray.__version__ != hpcray.__version__
assert ray.SCRIPT_MODE == 0 and {"get", "tune", "util"} <= {*dir(ray), "tune"}
assert "get" in dir(ray) and not hasattr(ray, "nonsense")
import ray.util.iter
assert ray.util.iter is hpcray.util.iter
""")


def test_private_names_that_ray_s_libraries_use(site: Site) -> None:
    site.good("""
import os, ray, ray._private.worker, ray._raylet
from ray import SCRIPT_MODE, WORKER_MODE, logger
from ray.cloudpickle import dumps_debug
from ray.core.generated import gcs_pb2
from ray.experimental.internal_kv import (
    _internal_kv_del, _internal_kv_exists, _internal_kv_get, _internal_kv_initialized,
    _internal_kv_list, _internal_kv_put)
from ray.experimental.tqdm_ray import safe_print
from ray.util.annotations import _mark_annotated, Deprecated, DeveloperAPI, PublicAPI
from ray.util.debug import log_once
from ray.util.metrics import Counter, Gauge, Histogram
from ray.util.placement_group import _valid_resource_shape
from ray.util.scheduling_strategies import SchedulingStrategyT
from ray._private.client_mode_hook import client_mode_hook
from ray._private.worker import _post_init_hooks, global_worker
from ray._raylet import (
    GRPC_STATUS_CODE_RESOURCE_EXHAUSTED, RAY_NODE_ID_KEY, RESOURCE_UNIT_SCALING, GcsClient, NodeID,
    build_address, is_ipv6, is_localhost, parse_address)

assert build_address("::1", 80) == "[::1]:80" and parse_address("[::1]:80") == ("::1", "80")
assert parse_address("a:b:80") is None and parse_address("host:80") == ("host", "80")
assert is_ipv6("::1") and not is_ipv6("1.2.3.4") and is_localhost("localhost")
for name in ("ActorID", "JobID", "NodeID", "ObjectRef", "PlacementGroupID", "TaskID", "WorkerID"):
    assert getattr(ray, name).nil().is_nil(), name
assert not _internal_kv_initialized() and not global_worker.connected
hooks = []
_post_init_hooks.append(lambda: hooks.append(ray.is_initialized()))

@ray.remote
class A:
    def look(self):
        from ray._private.worker import global_worker
        assert global_worker.mode == ray.WORKER_MODE and global_worker.connected
        assert global_worker.actor_id.hex() == ray.get_runtime_context().get_actor_id()
        assert os.path.isdir(ray._private.worker._global_node.get_session_dir_path())
        _internal_kv_put(b"of the actor", b"1")
        return _internal_kv_get(b"of the driver")

assert ray.get(ray.put(1)) == 1  # an automatic init
assert hooks == [True] and global_worker.mode == ray.SCRIPT_MODE
_internal_kv_put(b"of the driver", b"2")
assert ray.get(A.remote().look.remote()) == b"2"
assert _internal_kv_get(b"of the actor") == b"1" and _internal_kv_exists(b"of the driver")
assert sorted(_internal_kv_list(b"of the")) == [b"of the actor", b"of the driver"]
assert _internal_kv_del(b"of the actor") and not _internal_kv_exists(b"of the actor")
folder = ray._private.worker._global_node.get_session_dir_path()
assert os.path.isdir(folder)
open("folder", "w").write(folder)
""")
    folder = (site.folder / "folder").read_text()
    assert "hpcray-packages-" in folder and not os.path.exists(folder)


def test_private_names_that_programs_of_others_use(site: Site) -> None:
    site.good("""
import ray
from ray._private.services import get_node_ip_address
assert get_node_ip_address is ray.util.get_node_ip_address and get_node_ip_address().count(".") == 3
assert ray._raylet.ObjectRef is ray.ObjectRef
""")


def test_nothing_of_it_is_there_without_the_switch(with_ray: Site) -> None:
    with_ray.good("""
import sys, hpcray, hpcray.api, hpcray.worker.zygote
assert not [name for name in sys.modules if "as_ray" in name]
assert not [finder for finder in sys.meta_path if "RayFinder" in repr(finder)]
try:
    import ray
except RuntimeError as error:
    assert "the real ray" in str(error)
else:
    raise AssertionError
""", switch=False)


def test_workers_import_it_too(site: Site) -> None:
    site.write("script.py", """
import ray
import hpcray
from ray.util.queue import Queue

@ray.remote
def f(queue):
    import ray, sys
    import ray.util.queue
    assert ray.util.queue.Queue is type(queue)
    return ray.get_runtime_context().get_task_name(), "hpcray" in str(ray.get.__module__)

@ray.remote
class A:
    def nested(self, queue):
        return ray.get(f.remote(queue))

ray.init(num_cpus=2)
queue = Queue()
assert ray.get(f.remote(queue)) == ("f", True)
assert ray.get(A.remote().nested.remote(queue)) == ("f", True)
queue.shutdown()
""")
    site.good("", switch=False, command=("-m", "hpcray", "run", "--as-ray", "script.py"))
    site.good("exec(open('script.py').read())")


def test_what_the_driver_has_imported_is_imported_once(with_ray: Site) -> None:
    with_ray.write("ray/tune/__init__.py", "import os; pid = os.getpid()")
    with_ray.good("""
import os, ray
from ray import tune
ray.init(num_cpus=1)

@ray.remote
def where():
    from ray import tune
    return tune.pid, os.getpid(), os.getppid()

imported, worker, zygote = ray.get(where.remote())
assert imported == zygote != worker
""")


def test_a_real_ray_that_is_imported_already_is_refused(with_ray: Site) -> None:
    with_ray.write("ray/__init__.py")
    said = with_ray.bad("import ray\n" + SWITCH, switch=False)
    assert "ray is imported already" in said and "first line" in said
    with_ray.good(SWITCH)  # the second time nothing happens


@pytest.mark.skipif(bool(importlib.util.find_spec("ray")), reason="ray is installed here")
def test_libraries_without_an_installed_ray_say_what_to_install(site: Site) -> None:
    said = site.bad("import ray.rllib.algorithms")
    assert 'pip install "ray[rllib]==2.60.0"' in said
    assert "ray[tune]" in site.bad("from ray import tune")


def test_libraries_are_the_files_of_the_installed_ray(with_ray: Site) -> None:
    with_ray.write("ray/tune/__init__.py", """
import ray
import ray.data
from ray.tune.deep.thing import where
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray._private.worker import global_worker, SCRIPT_MODE
from ray.util.placement_group import _valid_resource_shape

assert issubclass(ray.data.iterator.DataIterator, object)  # nobody has imported that module

def fit(data: ray.data.Dataset):
    assert not isinstance(data, ray.data.Dataset)
    assert ray._private.worker.global_worker is global_worker
    assert global_worker.mode is None and not global_worker.connected
    assert _valid_resource_shape({"CPU": 1}, [{"CPU": 1}])
    assert not _valid_resource_shape({"CPU": 2}, [{"CPU": 1}, {"GPU": 2}])
    return where
""")
    with_ray.write("ray/tune/deep/thing.py", "where = __file__")
    found = with_ray.good("""
import ray
import ray.tune
print(ray.tune.fit(1))
assert ray.__version__ == "2.60.0" and ray.tune.__spec__.name == "ray.tune"
assert not hasattr(hpcray, "_private")
""")
    assert found.strip() == str(with_ray.folder / "ray/tune/deep/thing.py")


@pytest.mark.parametrize(("use", "said"), [
    ("import ray.data; ray.data.Dataset()", "ray.data.Dataset is not part of hpcray"),
    ("import ray.data; ray.data.read_parquet('x')", "ray.data.read_parquet is not part of hpcray"),
    ("import ray.data; ray.data.Nonsense", "ray.data.Nonsense is not part of hpcray"),
    ("import ray.data.nonsense", "there is no ray.data.nonsense in hpcray"),
    ("from ray.data.block import BlockMetadata, Nonsense", "cannot import name 'Nonsense'"),
    ("from ray._raylet import GcsClient; GcsClient.connect()", "GcsClient.connect is not part"),
    ("import ray.serve", "ray.serve is not part of hpcray: "),
    ("from ray import serve", "ray.serve is not part of hpcray: "),
    ("import ray.serve.handle", "ray.serve is not part of hpcray: "),
    ("import ray; ray.serve", "ray.serve is not part of hpcray: "),
    ("import ray.dag", "ray.dag is not part of hpcray: pass refs"),
    ("import ray.util.spark", "ray.util.spark is not part of hpcray: "),
    ("import ray.nonsense", "there is no ray.nonsense in hpcray"),
    ("import ray; ray.nonsense", "has no attribute 'nonsense'"),
])
def test_what_is_not_there_says_so(site: Site, use: str, said: str) -> None:
    assert said in site.bad(use)


def test_a_version_that_is_not_tested_is_refused(site: Site) -> None:
    site.install_ray("1.13.0")
    said = site.bad("")
    assert "ray 1.13.0 is installed, and tested are 2.60" in said
    assert "HPCRAY_AS_RAY_ANY_VERSION=1" in said
    site.good("", HPCRAY_AS_RAY_ANY_VERSION="1")
    site.good("import hpcray; hpcray.as_ray(any_version=True); import ray; print(ray.get)",
              switch=False)
    done = site.run("print(1)", switch=False, command=("-m", "hpcray", "run", "--as-ray", "-m"))
    assert done.returncode == 2 and "hpcray run: ray 1.13.0 is installed" in done.stderr
    assert "Traceback" not in done.stderr
