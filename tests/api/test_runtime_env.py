"""`runtime_env`: variables, working directories and modules, of a job, a task or an actor."""

from __future__ import annotations

import os
import textwrap
import zipfile

import pytest

of_tasks = pytest.mark.ray_differs("Ray packs directories for whole jobs only")


@pytest.fixture
def folders(tmp_path):
    """Two directories with a module of the same name, and a package."""
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "env_helper.py").write_text(f"VALUE = {name!r}\n")
        (tmp_path / name / "sub" / "data.txt").write_text(f"data {name}")
        (tmp_path / name / "left_out.log").write_text("x")
    (tmp_path / "lib" / "env_package").mkdir(parents=True)
    (tmp_path / "lib" / "env_package" / "__init__.py").write_text("NAME = 'package'\n")
    (tmp_path / "lib" / "env_single.py").write_text("NAME = 'single'\n")
    return tmp_path


@pytest.fixture
def look(ray):
    @ray.remote
    def look():
        import os

        import env_helper

        with open("sub/data.txt") as data:
            return env_helper.VALUE, data.read(), sorted(os.listdir())

    return look


@of_tasks
def test_a_working_directory_of_a_task(ray, folders, look):
    one = look.options(runtime_env={"working_dir": str(folders / "one")})
    two = look.options(runtime_env={"working_dir": str(folders / "two")})
    for _ in range(2):
        found = ray.get([one.remote(), two.remote(), one.remote()])
        assert [value for value, _, _ in found] == ["one", "two", "one"]
        assert [data for _, data, _ in found] == ["data one", "data two", "data one"]


@of_tasks
def test_files_left_out(ray, folders, look):
    env = {"working_dir": str(folders / "one"), "excludes": ["*.log"]}
    _, _, names = ray.get(look.options(runtime_env=env).remote())
    assert "left_out.log" not in names
    assert "env_helper.py" in names


@of_tasks
def test_a_zipped_working_directory(ray, folders, look):
    path = folders / "one.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folders / "two" / "env_helper.py", "env_helper.py")
        archive.write(folders / "two" / "sub" / "data.txt", "sub/data.txt")
    assert ray.get(look.options(runtime_env={"working_dir": str(path)}).remote())[0] == "two"


@of_tasks
def test_modules(ray, folders):
    @ray.remote
    def use():
        import env_package

        return env_package.NAME

    env = {"py_modules": [str(folders / "lib" / "env_package")]}
    assert ray.get(use.options(runtime_env=env).remote()) == "package"
    with pytest.raises(ImportError):
        ray.get(use.remote())


@pytest.mark.ray_differs("Ray takes packages only")
def test_a_module_of_one_file(ray, folders):
    @ray.remote(runtime_env={"py_modules": [str(folders / "lib" / "env_single.py")]})
    def use():
        import env_single

        return env_single.NAME

    assert ray.get(use.remote()) == "single"


@of_tasks
def test_an_actor_lives_in_its_environment(ray, folders):
    @ray.remote
    class A:
        def value(self):
            import os

            import env_helper

            return env_helper.VALUE, os.environ["OF_ACTOR"]

    env = {"working_dir": str(folders / "one"), "env_vars": {"OF_ACTOR": "a"}}
    actor = A.options(runtime_env=env).remote()
    assert [ray.get(actor.value.remote()) for _ in range(2)] == [("one", "a")] * 2


@of_tasks
def test_children_inherit(ray, folders, look):
    variable = ray.remote(lambda: __import__("os").environ.get("OF_PARENT"))

    @ray.remote
    def parent():
        return ray.get(look.remote())[0], ray.get(variable.remote())

    @ray.remote
    def with_more(env):
        return (ray.get(look.options(runtime_env=env).remote())[0],
                ray.get(variable.options(runtime_env=env).remote()))

    env = {"working_dir": str(folders / "one"), "env_vars": {"OF_PARENT": "p"}}
    assert ray.get(parent.options(runtime_env=env).remote()) == ("one", "p")
    other = {"working_dir": str(folders / "two"), "env_vars": {"OTHER": "o"}}
    assert ray.get(with_more.options(runtime_env=env).remote(other)) == ("two", "p")
    assert ray.get(variable.remote()) is None


def test_an_environment_of_the_job(bare_ray, init_options, folders):
    ray = bare_ray
    ray.init(num_cpus=2, **init_options, runtime_env={
        "working_dir": str(folders / "one"), "py_modules": [str(folders / "lib" / "env_package")],
        "env_vars": {"OF_JOB": "j"}})

    @ray.remote
    def use():
        import os

        import env_helper
        import env_package

        return env_helper.VALUE, env_package.NAME, os.environ["OF_JOB"]

    @ray.remote
    class A:
        def use(self):
            import env_helper

            return env_helper.VALUE

    assert ray.get(use.remote()) == ("one", "package", "j")
    assert ray.get(A.remote().use.remote()) == "one"


@of_tasks
def test_a_program_started_by_a_task_finds_the_modules(ray, folders):
    @ray.remote
    def start():
        import subprocess
        import sys

        return subprocess.check_output(
            [sys.executable, "-c", "import env_helper; print(env_helper.VALUE)"], text=True)

    env = {"working_dir": str(folders / "one")}
    assert ray.get(start.options(runtime_env=env).remote()) == "one\n"


@pytest.mark.ray_differs("Ray says it later, or takes what we do not")
@pytest.mark.parametrize(("env", "error", "says"), [
    ({"working_dir": "/not/there"}, ValueError, "/not/there"),
    ({"working_dir": 1}, TypeError, "paths"),
    ({"working_dir": "s3://bucket/x.zip"}, ValueError, "remote"),
    ({"working_dir": __file__}, ValueError, "directory"),
    ({"py_modules": "x"}, TypeError, "list"),
    ({"py_modules": ["/not/there"]}, ValueError, "/not/there"),
    ({"excludes": "*.log"}, TypeError, "list"),
    ({"pip": ["x"]}, NotImplementedError, "install"),
    ({"uv": ["x"]}, NotImplementedError, "install"),
    ({"image_uri": "x"}, NotImplementedError, "image_uri"),
    ({"py_executable": "x"}, NotImplementedError, "py_executable"),
    ({"nsight": "default"}, NotImplementedError, "nsight"),
    ({"conda": "x"}, NotImplementedError, "conda"),
])
def test_environments_that_cannot_be(ray, env, error, says):
    with pytest.raises(error, match=says):

        @ray.remote(runtime_env=env)
        def f():
            pass


@pytest.mark.hpcray_only("Ray's error type depends on the size")
def test_too_large(ray, folders, monkeypatch):
    from hpcray import environment

    monkeypatch.setattr(environment, "MAX_BYTES", 5)
    f = ray.remote(runtime_env={"working_dir": str(folders / "one")})(lambda: 1)
    with pytest.raises(ray.exceptions.RuntimeEnvSetupError, match="excludes"):
        f.remote()


@pytest.mark.hpcray_only("where packages lie is ours")
def test_nothing_is_left(run_driver, folders, tmp_path):
    script = textwrap.dedent(f"""
        import os, signal, tempfile
        ray.init(num_cpus=1)
        @ray.remote(runtime_env={{"working_dir": {str(folders / "one")!r}}})
        def f():
            return os.getcwd(), os.getppid()
        cwd, _ = ray.get(f.remote())
        folder = os.path.dirname(cwd)
        assert os.stat(folder).st_mode & 0o777 == 0o700
        print(folder)
    """)
    folder = run_driver(script).stdout.strip()
    assert not os.path.exists(folder)


def test_variables_in_variables(ray):
    wanted = {"ONE": "/x:${PATH}", "TWO": "<${NOT_SET_ANYWHERE}>", "THREE": "50 $"}

    @ray.remote(runtime_env={"env_vars": wanted})
    def look():
        return [os.environ[name] for name in wanted]

    path = ray.get(ray.remote(lambda: os.environ["PATH"]).remote())
    for _ in range(2):  # of the worker, not of the task before
        assert ray.get(look.remote()) == [f"/x:{path}", "<>", "50 $"]

    @ray.remote(runtime_env={"env_vars": {"PATH": "/x:${PATH}"}})
    class Actor:
        def look(self):
            return os.environ["PATH"]

    assert ray.get(Actor.remote().look.remote()) == f"/x:{path}"


def test_variables_in_variables_of_the_job(bare_ray, init_options, monkeypatch):
    monkeypatch.setenv("OF_DRIVER", "driver")
    wanted = {"ONE": "<${OF_DRIVER}>", "TWO": "<${NOT_SET_ANYWHERE}>"}
    bare_ray.init(num_cpus=1, **init_options, runtime_env={"env_vars": wanted})
    look = bare_ray.remote(lambda: [os.environ["ONE"], os.environ["TWO"]])
    assert bare_ray.get(look.remote()) == ["<driver>", "<>"]


def test_a_runtime_env_is_told_by_class(ray):
    @ray.remote(runtime_env={"env_vars": {"A": "1"}})
    def told():
        return ray.get_runtime_context().runtime_env

    for env in (ray.get_runtime_context().runtime_env, ray.get(told.remote())):
        assert isinstance(env, ray.runtime_env.RuntimeEnv)
    assert ray.get(told.remote()).to_dict()["env_vars"]["A"] == "1"


def test_a_runtime_env_by_class(ray):
    environment = ray.runtime_env.RuntimeEnv(env_vars={"BY_CLASS": "yes"}, working_dir=None)
    assert isinstance(environment, dict)
    assert environment["env_vars"] == {"BY_CLASS": "yes"}
    look = ray.remote(lambda: os.environ.get("BY_CLASS"))
    assert ray.get(look.options(runtime_env=environment).remote()) == "yes"
    with pytest.raises(TypeError):
        ray.runtime_env.RuntimeEnv(env_vars={"BY_CLASS": 1})


def test_variables_belong_to_a_process(cluster):
    """What has read them at its import keeps them: other variables, another process."""
    ray = cluster(num_cpus=1)
    look = ray.remote(lambda: (os.environ.get("X"), os.getpid()))
    with_x = {x: look.options(runtime_env={"env_vars": {"X": x}}) for x in "12"}
    found = [ray.get(one.remote()) for one in (with_x["1"], with_x["2"], look)]
    assert [x for x, _ in found] == ["1", "2", None]
    assert len({pid for _, pid in found}) == 3
    if ray.__name__ == "hpcray":  # Ray may start more
        assert [ray.get(one.remote()) for one in (with_x["1"], with_x["2"], look)] == found


@pytest.mark.hpcray_only("how many processes there are is ours")
def test_many_environments_leave_few_processes(cluster, eventually):
    ray = cluster(num_cpus=1)
    pid = ray.remote(lambda: os.getpid())
    pids = {ray.get(pid.options(runtime_env={"env_vars": {"X": str(x)}}).remote())
            for x in range(60)}
    assert len(pids) == 60

    def alive():
        return sum(os.path.exists(f"/proc/{one}") for one in pids)

    eventually(lambda: alive() <= 34)


def test_what_a_child_inherits(bare_ray, init_options):
    ray = bare_ray
    ray.init(num_cpus=4, runtime_env={"env_vars": {"JOB": "job", "BOTH": "job"}}, **init_options)
    names = ("JOB", "BOTH", "PARENT", "CHILD")

    @ray.remote
    def look():
        return [os.environ.get(name) for name in names]

    @ray.remote(runtime_env={"env_vars": {"PARENT": "parent", "BOTH": "parent"}})
    def parent(own):
        return ray.get((look if own is None else look.options(runtime_env=own)).remote())

    @ray.remote(runtime_env={"env_vars": {"BOTH": "actor"}})
    class Actor:
        def child(self):
            return ray.get(look.remote())

    assert ray.get(look.remote()) == ["job", "job", None, None]
    for own in (None, {}):
        assert ray.get(parent.remote(own)) == ["job", "parent", "parent", None]
    own = {"env_vars": {"CHILD": "child"}}
    assert ray.get(parent.remote(own)) == ["job", "parent", "parent", "child"]
    assert ray.get(Actor.remote().child.remote()) == ["job", "actor", None, None]


def test_a_setup_hook_runs_once_in_every_worker(bare_ray, init_options):
    ray = bare_ray

    def hook():
        os.environ["HOOKED"] = os.environ.get("HOOKED", "") + os.environ.get("OF_TASK", "x")

    env = {"worker_process_setup_hook": hook, "env_vars": {"OF_JOB": "1"}}
    ray.init(num_cpus=2, runtime_env=env, **init_options)
    look = ray.remote(lambda: os.environ["HOOKED"])
    assert ray.get([look.remote() for _ in range(4)]) == ["x"] * 4
    assert ray.get(look.remote()) == "x"
    own = {"env_vars": {"OF_TASK": "task"}}
    assert ray.get(look.options(runtime_env=own).remote()) == "task"
    actor = ray.remote(type("Actor", (), {"look": lambda self: os.environ["HOOKED"]})).remote()
    assert ray.get(actor.look.remote()) == "x"
    assert ray.get_runtime_context().runtime_env["worker_process_setup_hook"] == "hook"
    assert "HOOKED" not in os.environ


def test_a_setup_hook_by_name(bare_ray, init_options):
    env = {"worker_process_setup_hook": "gc.disable"}
    bare_ray.init(num_cpus=1, runtime_env=env, **init_options)

    @bare_ray.remote
    def collects():
        import gc

        return gc.isenabled()

    assert bare_ray.get(collects.remote()) is False


@pytest.mark.ray_differs("in Ray the worker dies, and the reason is in a file")
def test_a_setup_hook_that_fails_is_the_tasks_error(bare_ray):
    ray = bare_ray

    def hook():
        raise ValueError("of the hook")

    ray.init(num_cpus=1, runtime_env={"worker_process_setup_hook": hook})
    with pytest.raises(ray.exceptions.RuntimeEnvSetupError, match="of the hook"):
        ray.get(ray.remote(lambda: 1).remote())
    actor = ray.remote(type("Actor", (), {"f": lambda self: 1})).remote()
    with pytest.raises(ray.exceptions.ActorDiedError, match="of the hook"):
        ray.get(actor.f.remote())


@pytest.mark.parametrize(("hook", "error"), [(5, TypeError), ("no_module", TypeError)])
@pytest.mark.ray_differs("Ray checks it later")
def test_a_setup_hook_that_cannot_be(bare_ray, hook, error):
    with pytest.raises(error, match="setup_hook"):
        bare_ray.init(num_cpus=1, runtime_env={"worker_process_setup_hook": hook})


@pytest.mark.ray_differs("a TypeError of JSON in Ray")
def test_a_setup_hook_is_the_jobs(ray):
    with pytest.raises(ValueError, match="init"):
        ray.remote(runtime_env={"worker_process_setup_hook": "a.b"})(lambda: 1)


def test_the_class_and_its_fields(backend):
    RuntimeEnv = backend.runtime_env.RuntimeEnv
    env = RuntimeEnv(env_vars={"A": "1"}, working_dir="/tmp", py_modules=["/tmp"], excludes=["*.x"])
    assert (env.env_vars(), env.working_dir(), env.py_modules()) == ({"A": "1"}, "/tmp", ["/tmp"])
    assert env.has_working_dir() and not env.has_pip() and not env.has_conda() and not env.has_uv()
    assert not RuntimeEnv().has_working_dir()
    assert RuntimeEnv.deserialize(env.serialize()) == env == env.to_dict() == env.copy()
    env.set("env_vars", {"B": "2"})
    env["excludes"] = ["*.y"]
    assert (env["env_vars"], env.get("excludes"), env.get("pip", 5)) == ({"B": "2"}, ["*.y"], 5)
    with pytest.raises(TypeError):
        env.set("env_vars", {"B": 2})
    assert RuntimeEnv() == {}
    for wrong, error in ((0, ValueError), ("a", TypeError)):
        with pytest.raises(error):
            RuntimeEnv(config={"setup_timeout_seconds": wrong})
