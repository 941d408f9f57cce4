"""`py_modules` given as modules that the driver has imported, of a task, an actor or the job."""

from __future__ import annotations

import importlib
import itertools
import sys

import pytest

of_tasks = pytest.mark.ray_differs("Ray packs directories for whole jobs only")
_names = itertools.count()


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """`make_module(single)`: a module only this process can import, with a name of its own."""
    made = []

    def make_module(single=False):
        name = f"given_module_{next(_names)}"
        root = tmp_path / "only here"
        root.mkdir(exist_ok=True)
        if single:
            (root / f"{name}.py").write_text("NAME = 'single'\n")
        else:
            (root / name).mkdir()
            (root / name / "__init__.py").write_text("NAME = 'package'\n")
            (root / name / "inner.py").write_text("NAME = 'inner'\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(root))
            module = importlib.import_module(name)
        made.append(name)
        assert str(root) not in sys.path  # workers have the driver's
        return module

    yield make_module
    for name in made:
        sys.modules.pop(name, None)


def look(name, inner=True):
    import importlib

    found = importlib.import_module(name)
    within = importlib.import_module(f"{name}.inner").NAME if inner else None
    return found.NAME, within, found.__file__


@pytest.fixture
def local_look():
    """`look` by value: no worker can import this module."""
    import types

    return types.FunctionType(look.__code__, {"__builtins__": __builtins__}, "look", (True,))


@of_tasks
def test_a_package(ray, make_module, local_look, tmp_path):
    module = make_module()
    look = ray.remote(local_look)
    env = {"py_modules": [module]}
    name, inner, path = ray.get(
        look.options(runtime_env=env).remote(module.__name__), timeout=20)
    assert (name, inner) == ("package", "inner")
    assert not path.startswith(str(tmp_path / "only here"))
    with pytest.raises(ImportError):
        ray.get(look.remote(module.__name__), timeout=20)


@pytest.mark.ray_differs("Ray takes packages only")
def test_a_module_of_one_file(ray, make_module, local_look, tmp_path):
    module = make_module(single=True)
    look = ray.remote(local_look).options(runtime_env={"py_modules": [module]})
    name, _, path = ray.get(look.remote(module.__name__, inner=False), timeout=20)
    assert name == "single"
    assert not path.startswith(str(tmp_path / "only here"))


@of_tasks
def test_an_actor_of_its_own(ray, make_module, local_look):
    first, second = make_module(), make_module()
    here = local_look

    @ray.remote
    class A:
        def look(self, name):
            return here(name)[:2]

        def look_in_a_child(self, name):
            return ray.get(ray.remote(here).remote(name), timeout=20)[:2]

    one = A.options(runtime_env={"py_modules": [first]}).remote()
    two = A.options(runtime_env={"py_modules": [second]}).remote()
    plain = A.remote()
    for actor, module, other in ((one, first, second), (two, second, first)):
        for method in (actor.look, actor.look_in_a_child):
            assert ray.get(method.remote(module.__name__), timeout=20) == ("package", "inner")
            with pytest.raises(ImportError):
                ray.get(method.remote(other.__name__), timeout=20)
        with pytest.raises(ImportError):
            ray.get(plain.look.remote(module.__name__), timeout=20)


def test_of_the_job(bare_ray, init_options, make_module, local_look):
    ray, module = bare_ray, make_module()
    ray.init(num_cpus=1, **init_options, runtime_env={"py_modules": [module]})
    found = ray.get(ray.remote(local_look).remote(module.__name__), timeout=20)
    assert found[:2] == ("package", "inner")
