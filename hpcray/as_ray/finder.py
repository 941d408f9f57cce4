"""The meta-path finder: what `import ray` and `import ray.X` find.

    import ray.tune.tuner
      -> find_spec("ray.tune.tuner")
      -> table.kind_of(...)   served: a file of the installed ray
                              ours:   the module hpcray.X, under a second name
                              stub:   a module of names that refuse to be used
                              same:   hpcray's of the same name; or ModuleNotFoundError with a
                                      sentence (hpcray/absent.py)

A module of ours is not executed a second time: both names are one module, so that classes are
what they are under either name, and what a worker unpickles is what the driver has.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from hpcray import absent
from hpcray.as_ray import stubs, table

_ANY_VERSION = "HPCRAY_AS_RAY_ANY_VERSION"


def is_installed() -> bool:
    """Whether `import ray` gives hpcray in this process."""
    return _finder() is not None


def switch_on(*, any_version: bool = False) -> None:
    """`install` in a driver, which looks at the version of the installed ray for the whole job.

    Raises:
      ImportError: ray itself is imported already, or is of a version that was not tested.
    """
    if "ray" in sys.modules and not is_installed():
        raise ImportError(
            "ray is imported already, with its own core; call hpcray.as_ray() as the first line of "
            "the script, before anything imports ray, or use `hpcray run --as-ray`")
    version = _installed_ray()[1]
    if version and not (any_version or os.environ.get(_ANY_VERSION) == "1"):
        series = ".".join(version.split(".")[:2])
        if series not in table.TESTED:
            raise ImportError(
                f"ray {version} is installed, and tested are {', '.join(table.TESTED)}; install "
                f"one of these, or try it with {_ANY_VERSION}=1 in the environment")
    install()


def install() -> None:
    """Make `import ray` give hpcray in this process; nothing happens the second time."""
    if not is_installed():
        for name, value in table.STARTUP_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        sys.meta_path.insert(0, RayFinder(*_installed_ray()))


def _finder() -> RayFinder | None:
    return next((found for found in sys.meta_path if isinstance(found, RayFinder)), None)


def _installed_ray() -> tuple[Path | None, str]:
    """The folder of the ray that is installed, and its version, without importing it."""
    try:
        distribution = importlib.metadata.distribution("ray")
    except importlib.metadata.PackageNotFoundError:
        return None, ""
    folder = Path(str(distribution.locate_file("ray")))
    return (folder, distribution.version) if folder.is_dir() else (None, "")


# Errors about modules that Ray has do not name them: then `from ray import tune` passes the error
# on, and does not say that it "cannot import name 'tune'".


class RayFinder(importlib.abc.MetaPathFinder):
    """First on `sys.meta_path`; every name below `ray` ends here, found or refused."""

    def __init__(self, folder: Path | None, version: str) -> None:
        self._folder = folder
        self.version = version

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None,
        target: types.ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != "ray" and not fullname.startswith("ray."):
            return None
        kind, value = table.kind_of(fullname)
        match kind:
            case table.ROOT:
                loader: importlib.abc.Loader = _RootLoader(self._folder, self.version)
                return importlib.util.spec_from_loader(fullname, loader, is_package=True)
            case table.SERVED:
                return self._served(fullname)
            case table.OURS:
                return importlib.util.spec_from_loader(fullname, _SecondName(value))
            case table.STUB:
                return importlib.util.spec_from_loader(
                    fullname, _StubLoader(value), is_package=True)
        ours = "hpcray" + fullname[3:]
        if _exists(ours):
            return importlib.util.spec_from_loader(fullname, _SecondName(ours))
        said = None if value else absent.sentence(fullname[4:], "ray")
        if said is not None:
            raise ModuleNotFoundError(said)
        raise ModuleNotFoundError(
            f"there is no {fullname} in hpcray; docs/api.md lists what there is", name=fullname)

    def _served(self, fullname: str) -> ModuleSpec | None:
        if self._folder is None:
            raise ModuleNotFoundError(
                f"{fullname} comes from Ray's own package, which is not installed: "
                f'pip install "ray[{table.extra_of(fullname)}]=={table.RECOMMENDED}"')
        place = self._folder.joinpath(*fullname.split(".")[1:])
        if (place / "__init__.py").is_file():
            return importlib.util.spec_from_file_location(
                fullname, place / "__init__.py", submodule_search_locations=[str(place)])
        file = place.with_name(place.name + ".py")
        if file.is_file():
            return importlib.util.spec_from_file_location(fullname, file)
        if place.is_dir():  # a namespace package
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        raise ModuleNotFoundError(
            f"ray {self.version} has no pure Python module {fullname}")


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _named(place: str) -> Any:
    name, _, attribute = place.partition(":")
    module = importlib.import_module(name)
    return getattr(module, attribute) if attribute else module


class _SecondName(importlib.abc.Loader):
    """A module of ours, under Ray's name too."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        assert module.__spec__ is not None
        fullname = module.__spec__.name
        module.__spec__ = self._spec  # The import system has put that of the second name there.
        for name, place in table.EXTRA_NAMES.get(fullname, {}).items():
            if not hasattr(module, name):
                stub = place == table.STUB
                setattr(module, name, stubs.stub(fullname, name) if stub else _named(place))


class _StubLoader(importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return stubs.module(spec.name, self._names)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Root(stubs.Importable):
    """`ray`: hpcray's names, and its own modules."""

    def __getattr__(self, name: str) -> Any:
        import hpcray

        if name in table.ROOT_NAMES:
            value = _named(table.ROOT_NAMES[name])
        elif name in table.ROOT_MODULES:
            value = importlib.import_module(f"ray.{name}")
        else:
            try:
                value = getattr(hpcray, name)
            except AttributeError as error:
                raise AttributeError(
                    absent.sentence(name, "ray")
                    or f"module 'ray' (hpcray) has no attribute {name!r}") from error
        return value

    def __dir__(self) -> list[str]:
        import hpcray

        return sorted({*super().__dir__(), *dir(hpcray), *table.ROOT_NAMES, *table.ROOT_MODULES})


class _RootLoader(importlib.abc.Loader):
    def __init__(self, folder: Path | None, version: str) -> None:
        self._folder = folder
        self._version = version

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Root(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        import hpcray

        module.__dict__.update({name: getattr(hpcray, name) for name in hpcray.__all__})
        module.__path__ = []
        module.__dict__["__version__"] = self._version or table.RECOMMENDED
        module.__dict__["__commit__"] = f"hpcray {hpcray.__version__}"
        if self._folder is not None:  # Libraries look for files beside it.
            module.__file__ = str(self._folder / "__init__.py")
