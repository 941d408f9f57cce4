"""Running a user's script as `python script.py` would, in this very process.

The script gets a fresh `__main__`, its own `sys.argv` and `sys.path[0]`; it may call
`breakpoint()`, run under cProfile or start IPython, and never sees that hpcray ran first:
tracebacks start at its own line, SystemExit passes, Ctrl-C ends the process by SIGINT as Python
itself does it.

`load` finds and compiles, and is where a typo is noticed; `Program.execute` runs. Between them
the caller starts what must be running before user code. (`load` of a module imports its parent
packages, as `python -m` does, so that much user code runs early.)

Why not `runpy`: `run_path` puts a temporary `__main__` in place and takes it away again, after
which atexit handlers and threads of the script find another one.
"""

from __future__ import annotations

import builtins
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader

from hpcray.exceptions import LaunchError


@dataclass(frozen=True, slots=True)
class Program:
    """User code, compiled and ready to be `__main__`.

    Attributes:
      argv: what it finds in sys.argv.
      path0: what Python would put in front of sys.path.
      namespace: what `__main__` holds before its first line.
    """

    code: types.CodeType
    argv: list[str]
    path0: str
    namespace: dict[str, object]

    def execute(self) -> None:
        """Be that program: returns when its last line is done, raises what it raises.

        Not undone afterwards: sys.argv, sys.path and `__main__` stay the script's, because its
        atexit handlers and threads run later still.
        """
        main, before = types.ModuleType("__main__"), sys.modules["__main__"]
        main.__dict__.update(__builtins__=builtins, **self.namespace)
        if "__annotations__" in before.__dict__:  # depends on the version of Python
            main.__dict__["__annotations__"] = {}
        # It is still on the stack, and must not be torn down under its own feet.
        _keep_alive.append(before)
        sys.modules["__main__"] = main
        sys.argv[:] = self.argv
        _set_path0(self.path0)
        try:
            exec(self.code, main.__dict__)
        except SystemExit:
            raise
        except BaseException as error:
            trace = error.__traceback__
            _show_from(error, trace.tb_next if trace is not None else None)
            raise


def load(target: str, args: Sequence[str] = (), *, module: bool = False) -> Program:
    """Find and compile a script, a directory or archive with a `__main__.py`, or a module.

    `args` are what follows its name on the command line.

    Raises:
      LaunchError: there is no such thing, or the working directory has been removed.
      SyntaxError: as Python raises it, and without frames of ours if it stays uncaught.
    """
    path0 = working_directory()
    if module:
        _set_path0(path0)
        sys.argv[:] = ["-m", *args]  # what its parent packages see, by Python's documentation
        spec = _module_spec(target)
        return _from_spec(spec, [spec.origin or target, *args], path0)
    # The rarer form is decided by what the file is, since zip archives go by any name. What is no
    # regular file (a pipe: `<(...)`, /dev/stdin) can be read once only, and is a script.
    if os.path.isdir(target) or (os.path.isfile(target) and _is_archive(target)):
        return _load_container(target, args)
    try:
        with open(target, "rb") as file:
            source = file.read()
    except OSError as error:
        raise LaunchError(f"can't open file {os.path.abspath(target)!r}: {error}") from error
    path = os.path.abspath(target)
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes, before Python 3.12
        _show_from(error, None)
        raise
    return Program(
        code,
        [target, *args],
        # Python resolves a link first: a script linked into bin/ finds its neighbours.
        os.path.dirname(os.path.realpath(target)),
        {"__file__": path, "__cached__": None, "__loader__": SourceFileLoader("__main__", path)},
    )


def working_directory() -> str:
    """Where this process is: its workers will be there too.

    Raises:
      LaunchError: somebody has removed that directory.
    """
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise LaunchError(
            "the working directory of this process has been removed, and workers would start in "
            "it. Change to a directory that exists (cd) and start again") from None


_keep_alive: list[object] = []


def _show_from(error: BaseException, trace: types.TracebackType | None) -> None:
    """Arrange that the uncaught error is shown from the user's first frame on.

    The error itself goes on to the top of the interpreter, which knows what Ctrl-C, pdb and `-i`
    need; only the hook that prints is wrapped, whichever hook the script has installed by now.
    """
    show = sys.excepthook

    def hook(
        kind: type[BaseException], value: BaseException, full: types.TracebackType | None
    ) -> None:
        if value is error:
            value.__traceback__ = full = trace
            sys.last_traceback = trace
        show(kind, value, full)

    sys.excepthook = hook


def _set_path0(path0: str) -> None:
    """Replace what Python put in front for hpcray's own start; under -P or -I it put nothing."""
    if not sys.flags.safe_path:
        sys.path[:1] = [path0]


def _module_spec(name: str) -> ModuleSpec:
    import importlib.util

    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.__main__.".startswith(f"{error.name}."):
            raise  # a parent package of the module misses something else
        spec = None
    if spec is None or spec.loader is None:
        raise LaunchError(f"no module named {name!r} that can be run (looked from {os.getcwd()})")
    return spec


def _load_container(target: str, args: Sequence[str]) -> Program:
    from importlib.machinery import PathFinder

    path = os.path.abspath(target)
    spec = PathFinder.find_spec("__main__", [path])
    if spec is None:
        raise LaunchError(f"can't find '__main__' module in {path!r}")
    return _from_spec(spec, [target, *args], path)


def _from_spec(spec: ModuleSpec, argv: list[str], path0: str) -> Program:
    loader = spec.loader
    get_code = getattr(loader, "get_code", None)
    code = None if get_code is None else get_code(spec.name)
    if code is None:
        raise LaunchError(f"{spec.name} is not Python code that can be run")
    namespace: dict[str, object] = {
        "__spec__": spec,
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__loader__": loader,
        "__package__": spec.parent,
    }
    return Program(code, argv, path0, namespace)


def _is_archive(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                return True
            # A zipapp has a shebang line first; a script has one too, so ask properly.
            if not path.endswith((".pyz", ".zip")):
                return False
    except OSError:
        return False
    import zipfile

    return zipfile.is_zipfile(path)
