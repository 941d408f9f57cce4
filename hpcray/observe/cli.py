"""The `hpcray` command.

    hpcray run [-n N] [--as-ray] script.py ARGS...   hpcray doctor     hpcray version

`run` is how every rank of every job starts, so it is the hot path of a launch: this module
imports `sys` and `os`, each command imports what it needs, and arguments are read by hand (a
command-line library costs more than the rest of the start, and would want to own the arguments
that belong to the script).

    hpcray run -n N script.py  --exec-->  mpirun -n N ... hpcray run script.py
    hpcray run script.py       rank 0, or no launcher: start this rank's node, then be the script
                               any other rank: become a node; the script is not imported

A new command is a line in COMMANDS: a function `(arguments) -> exit status`, and its help. A wrong
command line costs one sentence that ends with where the help is; the help itself is long enough.
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

  run [-n N] SCRIPT [ARGS...]   run a script; with -n, as a job of N nodes under mpirun
  doctor                        check this machine, and say what to fix
  version                       print the version

`hpcray COMMAND --help` tells more about one command.
"""

RUN_HELP = """\
usage: hpcray run [-n N] [--as-ray] [--ft] SCRIPT [ARGS...]
       hpcray run [-n N] [--as-ray] [--ft] -m MODULE [ARGS...]

Runs a program on hpcray. The script runs once. Its tasks run on every node of the job.

  hpcray run script.py                  one node: this machine, without MPI
  hpcray run -n 4 script.py             four nodes: hpcray finds mpirun and starts it
  mpirun -n 4 hpcray run script.py      four nodes under an mpirun of your own: no -n after `run`
  srun --mpi=pmix hpcray run script.py  the same in a Slurm allocation

  -n N, -np N  start N nodes under mpirun. HPCRAY_MPIRUN names another mpirun than the one found,
               and HPCRAY_MPIRUN_ARGS adds arguments to it, for example "--hostfile hosts"
  -m MODULE    run a module, as `python -m` does
  --as-ray     `import ray` gives hpcray: for programs written for Ray, and for Ray's own Tune and
               RLlib, from the ray that is installed here
  --ft         with -n and Open MPI 5: when a rank dies, the other ranks are told and the job ends
               with an error message. Without it mpirun kills the other ranks
  -h, --help   print this

Options stand before the script. What follows the script is the script's own.
"""

DOCTOR_HELP = """\
usage: hpcray doctor [MODULE...]

Checks this machine in some seconds: Python, mpirun, MPI, the control store, CPUs, GPUs, memory,
shared memory, and the HPCRAY_* variables that are set. Each problem comes with what to do.

With names of modules it says instead which of them a node can import once for all its workers
(`preload` of init, HPCRAY_PRELOAD), and why not the others.

The exit status is 0 if all is well, and 1 if something must be fixed.
"""

VERSION_HELP = """\
usage: hpcray version

Prints the version of hpcray.
"""

# As `python` does for a script it cannot open, and most programs for a wrong command line.
EXIT_USAGE = 2
# As the shell says it of a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141

HELP = ("-h", "--help")


class UsageError(Exception):
    """The command line cannot be understood; the text says why."""


class HelpWantedError(Exception):
    """The command line asks for the help of its command."""


@dataclass(frozen=True, slots=True)
class RunArguments:
    """`hpcray run`, understood. `ranks` is None without -n; `rest` belongs to the script."""

    target: str
    rest: tuple[str, ...]
    module: bool = False
    ranks: int | None = None
    ft: bool = False
    as_ray: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A word after `hpcray`: what it does, and what `--help` prints."""

    act: Callable[[list[str]], int]
    help: str


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status unless the script ends the process itself."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        print(USAGE, end="", file=sys.stderr)
        return EXIT_USAGE
    name, rest = arguments[0], arguments[1:]
    if name == "help" and rest:
        name, rest = rest[0], ["--help"]
    if name in ("help", *HELP):
        return _printing(lambda: print(USAGE, end=""))
    command = COMMANDS.get("version" if name in ("-V", "--version") else name)
    if command is None:
        return _refuse("hpcray", _no_command(name, rest))
    try:
        return command.act(rest)
    except HelpWantedError:
        return _printing(lambda: print(command.help, end=""))
    except UsageError as error:
        return _refuse(f"hpcray {name}", str(error))


def parse_run(arguments: list[str]) -> RunArguments:
    """Our options come before the script; all that follows it is the script's, "-n" too.

    Raises:
      UsageError: an option we do not have, or no script.
      HelpWantedError: --help.
    """
    ranks, ft, as_ray, at = None, False, False, 0
    while at < len(arguments) and arguments[at].startswith("-"):
        option = arguments[at]
        at += 1
        if option in HELP:
            raise HelpWantedError
        if option == "--ft":
            ft = True
        elif option == "--as-ray":
            as_ray = True
        elif option == "--":
            break
        elif option in ("-n", "-np"):
            if at == len(arguments):
                raise UsageError(f"{option} needs a number of nodes")
            ranks = _ranks(arguments[at])
            at += 1
        elif option.startswith(("-n=", "-np=")):
            ranks = _ranks(option.partition("=")[2])
        elif option.startswith("-n") and option[2:].isdigit():
            ranks = _ranks(option[2:])
        elif option == "-m":
            if at == len(arguments):
                raise UsageError("-m needs the name of a module")
            module, rest = arguments[at], tuple(arguments[at + 1 :])
            return _checked(RunArguments(module, rest, True, ranks, ft, as_ray))
        else:
            raise UsageError(
                f"there is no option {option}; options of the script stand after the script")
    if at >= len(arguments):
        raise UsageError("it needs a script, or -m and a module")
    script, rest = arguments[at], tuple(arguments[at + 1 :])
    return _checked(RunArguments(script, rest, False, ranks, ft, as_ray))


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
    if any(argument in HELP for argument in arguments):
        raise HelpWantedError
    option = next((argument for argument in arguments if argument.startswith("-")), None)
    if option is not None:
        raise UsageError(f"it has no option {option!r}; what it takes are names of modules")
    return _printing(lambda: _report(arguments))


def _report(modules: list[str]) -> int:
    if modules:
        from hpcray.observe.preloads import examine_preloads

        findings = examine_preloads(modules, os.environ)
    else:
        from hpcray.launch.doctor import examine

        findings = examine(os.environ)
    problems = 0
    for finding in findings:
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

    _takes_none(arguments)
    return _printing(lambda: print(f"hpcray {hpcray.__version__}"))


def _takes_none(arguments: list[str]) -> None:
    if any(argument in HELP for argument in arguments):
        raise HelpWantedError
    if arguments:
        raise UsageError(f"it takes no arguments, and {arguments[0]!r} is one")


def _printing(act: Callable[[], int | None]) -> int:
    """Do what only prints. A reader that has had enough (`| head`) is no error; never for a
    script, whose BrokenPipeError is its own."""
    try:
        status = act() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # What is still in the buffer goes nowhere; else the interpreter complains at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


COMMANDS = {
    "run": Command(run, RUN_HELP),
    "doctor": Command(doctor, DOCTOR_HELP),
    "version": Command(version, VERSION_HELP),
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

    if wanted.as_ray:
        from hpcray import as_ray

        try:
            as_ray.switch_on()
        except ImportError as error:
            raise LaunchError(str(error)) from error
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
    from hpcray.launch.script import working_directory

    # Said once and here, rather than by one rank among mpirun's own noise.
    path = os.path.join(working_directory(), wanted.target)
    if not wanted.module and not os.path.exists(path):
        raise LaunchError(f"can't open file {path!r}: no such file")
    if not wanted.module and not (os.path.isfile(path) or os.path.isdir(path)):
        raise LaunchError(
            f"{wanted.target} is a pipe, and mpirun hands no pipe on to its ranks: with -n the "
            "script must be a file")
    tail = ["-m", wanted.target] if wanted.module else ["--", wanted.target]
    if wanted.as_ray:
        tail.insert(0, "--as-ray")
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
        raise UsageError(f"-n needs a number of nodes from 1 up, not {text!r}")
    return int(text)


def _no_command(name: str, rest: list[str]) -> str:
    if os.path.exists(name):
        return f"there is no command {name!r}. To run it: hpcray run {' '.join([name, *rest])}"
    if name.startswith("-") and rest:
        return f"there is no option {name}. Did you mean hpcray run {' '.join([name, *rest])}?"
    from hpcray.protocol.words import did_you_mean

    return f"there is no command {name!r}.{did_you_mean(name, COMMANDS)}"


def _refuse(command: str, reason: str) -> int:
    end = "" if reason.endswith(("?", ".")) else "."
    print(f"{command}: {reason}{end} See `{command} --help`.", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
