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
