"""The `hpcray` command.

    hpcray run [-n N] [--ft] script.py ARGS...     hpcray doctor     hpcray version

`run` is how every rank of every job starts, so it is the hot path of a launch: this module
imports `sys` and `os`, each command imports what it needs, and arguments are read by hand (a
command-line library costs more than the rest of the start, and would want to own the arguments
that belong to the script).

    hpcray run -n N script.py  --exec-->  mpirun -n N ... hpcray run script.py
    hpcray run script.py       rank 0, or no launcher: start this rank's node, then be the script
                               any other rank: become a node; the script is not imported

A new command is a line in COMMANDS and a function `(arguments) -> exit status`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from hpcray.launch.script import Program

USAGE = """\
usage: hpcray COMMAND ...

  run [-n N] [--ft] SCRIPT [ARGS...]      run a script; with -n, as a job of N nodes under mpirun
  run [-n N] [--ft] -m MODULE [ARGS...]   the same for a module, as `python -m`
                                          --ft: Open MPI 5 tells the others when a rank dies, and
                                          the job ends in good order; else mpirun kills it
  doctor                                  check this machine, say what to fix
  version                                 print the version

Under a launcher leave -n out:  mpirun -n 4 hpcray run SCRIPT   or   srun hpcray run SCRIPT
"""

# As `python` does for a script it cannot open, and most programs for a wrong command line.
EXIT_USAGE = 2


class UsageError(Exception):
    """The command line cannot be understood; the text says why."""


@dataclass(frozen=True, slots=True)
class RunArguments:
    """`hpcray run`, understood. `ranks` is None without -n; `rest` belongs to the script."""

    target: str
    rest: tuple[str, ...]
    module: bool = False
    ranks: int | None = None
    ft: bool = False


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status unless the script ends the process itself."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="", file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    command = COMMANDS.get("version" if name in ("-V", "--version") else name)
    if command is None:
        return _refuse(f"there is no command {name!r}")
    try:
        return command(rest)
    except UsageError as error:
        return _refuse(str(error))


def parse_run(arguments: list[str]) -> RunArguments:
    """Our options come before the script; all that follows it is the script's, "-n" too.

    Raises:
      UsageError: an option we do not have, or no script.
    """
    ranks, ft, at = None, False, 0
    while at < len(arguments) and arguments[at].startswith("-"):
        option = arguments[at]
        at += 1
        if option == "--ft":
            ft = True
        elif option == "--":
            break
        elif option in ("-n", "-np"):
            ranks = _ranks(arguments[at] if at < len(arguments) else "")
            at += 1
        elif option.startswith("-n") and option[2:].isdigit():
            ranks = _ranks(option[2:])
        elif option == "-m":
            if at == len(arguments):
                raise UsageError("-m needs the name of a module")
            module, rest = arguments[at], tuple(arguments[at + 1 :])
            return _checked(RunArguments(module, rest, True, ranks, ft))
        else:
            raise UsageError(
                f"run has no option {option!r}; options of the script come after its name"
            )
    if at >= len(arguments):
        raise UsageError("run needs a script, or -m and a module")
    return _checked(RunArguments(arguments[at], tuple(arguments[at + 1 :]), False, ranks, ft))


def _checked(wanted: RunArguments) -> RunArguments:
    if wanted.ft and wanted.ranks is None:
        raise UsageError("--ft is for -n; under an mpirun of your own, give it `--with-ft ulfm`")
    return wanted


def run(arguments: list[str]) -> int:
    """`hpcray run`: act as this process's place in the launch demands."""
    from hpcray.exceptions import LaunchError

    wanted = parse_run(arguments)
    try:
        program = _start(wanted, arguments)
    except LaunchError as error:
        print(f"hpcray run: {error}", file=sys.stderr)
        return EXIT_USAGE
    # Out of reach of the `except` above: from here on every error is the script's own.
    program.execute()
    return 0


def doctor(arguments: list[str]) -> int:
    """`hpcray doctor`: exit status 1 if anything must be fixed."""
    from hpcray.launch.doctor import examine

    if arguments:
        raise UsageError("doctor takes no arguments")
    problems = 0
    for finding in examine(os.environ):
        mark = {"ok": "ok", "note": "note", "problem": "PROBLEM"}[finding.level]
        print(f"{mark:8}{finding.name:15}{finding.text}")
        if finding.fix:
            print(f"{'':23}-> {finding.fix}")
        problems += finding.level == "problem"
        sys.stdout.flush()  # the next check may take seconds
    print(f"\n{problems} problem{'s' if problems != 1 else ''} found" if problems else "\nall well")
    return 1 if problems else 0


def version(arguments: list[str]) -> int:
    """`hpcray version`."""
    import hpcray

    if arguments:
        raise UsageError("version takes no arguments")
    print(f"hpcray {hpcray.__version__}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "doctor": doctor,
    "version": version,
}


def _start(wanted: RunArguments, arguments: list[str]) -> Program:
    """Everything before user code. Returns on rank 0 and without a launcher only."""
    from hpcray.exceptions import LaunchError
    from hpcray.launch.identity import read_launch

    launch = read_launch(os.environ)
    if wanted.ranks is not None:
        if launch.mode == "mpi":
            raise LaunchError(
                f"-n {wanted.ranks} would start a job inside rank {launch.rank} of another one; "
                "under mpirun or srun leave -n out"
            )
        _exec_mpirun(wanted, arguments, wanted.ranks)
    if launch.rank > 0:
        from hpcray.launch.start import become_node

        become_node()
    from hpcray.launch import script
    from hpcray.launch.start import start_early

    # A script is compiled before anything starts: a typo ends the job at once. A module is looked
    # for afterwards, since looking imports its parent packages, and the node must start before
    # user code has threads and descriptors.
    if wanted.module:
        start_early()
        return script.load(wanted.target, wanted.rest, module=True)
    program = script.load(wanted.target, wanted.rest)
    start_early()
    return program


def _exec_mpirun(wanted: RunArguments, arguments: list[str], ranks: int) -> NoReturn:
    """Replace this process by mpirun: signals and the exit status need no middleman."""
    from hpcray.exceptions import LaunchError
    from hpcray.launch.mpirun import plan_mpirun

    if not wanted.module and not os.path.exists(wanted.target):
        # Said once and here, rather than by one rank among mpirun's own noise.
        raise LaunchError(f"can't open file {os.path.abspath(wanted.target)!r}: no such file")
    tail = ["-m", wanted.target] if wanted.module else ["--", wanted.target]
    command = [*_this_command(arguments), "run", *tail, *wanted.rest]
    argv, env = plan_mpirun(ranks, command, os.environ, ft=wanted.ft)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(argv[0], argv, env)
    except OSError as error:
        raise LaunchError(f"cannot run {argv[0]}: {error}") from error


def _this_command(arguments: list[str]) -> list[str]:
    """How this `hpcray` was started, with the options of its Python (-X, -W, -O)."""
    ours = ["run", *arguments]
    if sys.orig_argv[-len(ours) :] == ours:
        return [sys.executable, *sys.orig_argv[1 : -len(ours)]]
    return [sys.executable, "-m", "hpcray"]  # main() was called with arguments of its own


def _ranks(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UsageError(f"-n needs a number from 1 up, not {text!r}")
    return int(text)


def _refuse(reason: str) -> int:
    print(f"hpcray: {reason}\n\n{USAGE}", end="", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
