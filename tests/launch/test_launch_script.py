"""A script under hpcray and under python side by side: it must not be able to tell.

Each test runs one program twice, as `python script.py` and through `load` and `execute`, and
compares all that comes out: output, error output, exit status.
"""

from __future__ import annotations

import signal
import zipfile
from pathlib import Path

import pytest

# A launcher of one line, so that its frames would show. The blank argument of -c is its path0.
SCRIPT = ("import sys; from hpcray.launch.script import load; "
          "load(sys.argv[1], sys.argv[2:]).execute()")
MODULE = SCRIPT.replace("[2:]", "[2:], module=True")

SHOW = """
import sys, __main__
print(__name__, __file__, __spec__ and __spec__.name, __package__, __cached__ and "cached")
print(__builtins__ is __import__("builtins"), __doc__, type(__loader__).__name__)
print(sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals(), __main__.__file__)
print(sorted(globals()))
"""

PROGRAMS = {
    "names": SHOW,
    "docstring": '"""Mine."""\n' + SHOW,
    "error": "def f():\n    1/0\nf()\n",
    "chained": "try:\n    1/0\nexcept ZeroDivisionError as e:\n    raise KeyError('x') from e\n",
    "syntax": "print('never')\nx = = 1\n",
    "exit": "import sys\nsys.exit(7)\n",
    "exit-text": "import sys\nsys.exit('because')\n",
    "exit-none": "raise SystemExit\n",
    "interrupt": "raise KeyboardInterrupt\n",
    "hook": "import sys, traceback\n"
            "def hook(t, v, tb):\n    print('mine', t.__name__, len(traceback.extract_tb(tb)))\n"
            "sys.excepthook = hook\n1/0\n",
    "atexit": "import atexit\nNAME = 'still here'\ndef bye():\n    import __main__\n"
              "    print(NAME, __main__.NAME)\natexit.register(bye)\n",
    "thread": "import threading\nNAME = 'mine'\ngo = threading.Event()\n"
              "def late():\n    go.wait()\n"
              "    import __main__; print(__main__.NAME, NAME)\n"
              "threading.Thread(target=late).start()\n"
              "import atexit; threading._register_atexit(go.set)\n",
    "pickle": "import pickle\nclass C: pass\nprint(type(pickle.loads(pickle.dumps(C()))) is C)\n",
    "future": "def f(x: unknown): pass\n",  # no __future__ of ours may leak in
    "dataclass": "import dataclasses\n@dataclasses.dataclass\nclass P:\n    x: 'int'\n"
                 "print(P(1))\n",
    "neighbour": "import neighbour; print(neighbour.VALUE)\n",
    "frames": "import sys; print(sys._getframe().f_code.co_filename, sys._getframe().f_lineno)\n",
}


def outcome(done):
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_script(python, tmp_path: Path, name):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "script.py").write_text(PROGRAMS[name])
    (folder / "neighbour.py").write_text("VALUE = 42\n")
    args = ("code/script.py", "-n", "--x=1")
    expected = outcome(python(*args))
    assert outcome(python("-c", SCRIPT, *args)) == expected
    if name == "interrupt":
        assert expected[0] == -signal.SIGINT


def test_a_linked_script_finds_its_neighbours(python, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/script.py").write_text(SHOW + "import neighbour\n")
    (tmp_path / "real/neighbour.py").write_text("")
    (tmp_path / "link.py").symlink_to("real/script.py")
    expected = outcome(python("link.py"))
    assert expected[0] == 0
    assert outcome(python("-c", SCRIPT, "link.py")) == expected


@pytest.mark.parametrize("name", ["tool", "package", "package.inner"])
def test_module(python, tmp_path: Path, name):
    (tmp_path / "tool.py").write_text(SHOW)
    (tmp_path / "package").mkdir()
    for file in ("__main__.py", "inner.py"):
        (tmp_path / "package" / file).write_text(SHOW)
    (tmp_path / "package/__init__.py").write_text("import sys; print(sys.argv, sys.path[0])\n")
    expected = outcome(python("-B", "-m", name, "-m", "x"))
    assert expected[0] == 0
    assert outcome(python("-B", "-c", MODULE, name, "-m", "x")) == expected


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_container(python, tmp_path: Path, kind):
    if kind == "folder":
        (tmp_path / "app").mkdir()
        (tmp_path / "app/__main__.py").write_text(SHOW + "import part\n")
        (tmp_path / "app/part.py").write_text("")
    else:
        with zipfile.ZipFile(tmp_path / "app", "w") as archive:
            archive.writestr("__main__.py", SHOW + "import part\n")
            archive.writestr("part.py", "")
    expected = outcome(python("-B", "app", "1"))
    assert expected[0] == 0
    assert outcome(python("-B", "-c", SCRIPT, "app", "1")) == expected


@pytest.mark.parametrize(("code", "target", "says"), [
    (SCRIPT, "missing.py", "can't open file"),
    (MODULE, "no_such_module", "no module named 'no_such_module'"),
    (MODULE, "no_such.module", "no module named 'no_such.module'"),
    (MODULE, "json", "no module named 'json'"),  # a package without __main__
    (MODULE, "sys", "cannot be run|not Python code|no module"),
    (SCRIPT, "empty", "can't find '__main__'"),
])
def test_what_is_not_there_is_said_plainly(python, tmp_path: Path, code, target, says):
    (tmp_path / "empty").mkdir()
    done = python("-c", code, target)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "LaunchError" in last
    assert any(part in last for part in says.split("|"))


def test_a_missing_import_of_the_module_itself_stays_an_import_error(python, tmp_path: Path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package/__init__.py").write_text("import not_installed\n")
    (tmp_path / "package/__main__.py").write_text("")
    done = python("-c", MODULE, "package")
    assert "ModuleNotFoundError: No module named 'not_installed'" in done.stderr


def test_debugger_and_profiler(python, tmp_path: Path):
    (tmp_path / "script.py").write_text("x = 41\nbreakpoint()\nprint(x)\n")
    done = python("-c", SCRIPT, "script.py", stdin=None, input="x += 1\nc\n")
    assert done.returncode == 0 and "42" in done.stdout
    (tmp_path / "start.py").write_text(SCRIPT)
    done = python("-m", "cProfile", "start.py", "script.py", stdin=None, input="c\n")
    assert done.returncode == 0 and "script.py:1(<module>)" in done.stdout


def test_safe_path_is_respected(python, tmp_path: Path):
    (tmp_path / "script.py").write_text("import sys; print(sys.path)\n")
    expected = outcome(python("-P", "script.py"))
    assert outcome(python("-P", "-c", SCRIPT, "script.py")) == expected
