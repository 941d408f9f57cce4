"""Programs of others that use Ray Core, on hpcray and on Ray: do they run, and how long?

    python benchmarks/others.py                            # all; needs ray in the same environment
    python benchmarks/others.py --only emcee,pymoo --backend hpcray

Each file in `programs/` is a small program over one package, and names in its first lines what it
needs. It gets a venv of its own above this environment, made at the first run and kept, and is run
as it is: `hpcray run --as-ray FILE`, and `python FILE` for Ray. It is right if it ends with 0.

Seconds are those of the whole process, from its start to its end.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

PROGRAMS = Path(__file__).with_name("programs")
DEFAULT_VENVS = Path(".venv-others")
INSTALL_LIMIT_S = 900.0
_HEADER = re.compile(r"^# /// script\n((?:#.*\n)*?)# ///$", re.MULTILINE)


class Outcome(NamedTuple):
    """Of one program on one side. `why` is empty if it ran."""

    why: str
    seconds: float

    def cell(self) -> str:
        return "no" if self.why else f"{self.seconds:.1f} s"


def requirements(program: Path) -> list[str]:
    """What a program says it needs (as in PEP 723); its package comes first."""
    header = _HEADER.search(program.read_text())
    if header is None:
        raise ValueError(f"{program} does not say what it needs, in a `# /// script` block")
    text = "\n".join(line[2:] for line in header[1].splitlines())
    found: list[str] = tomllib.loads(text)["dependencies"]
    return found


def prepare(folder: Path, wanted: list[str]) -> str:
    """Make the venv and install; what went wrong, or ''."""
    stamp = folder / "installed"
    if stamp.exists() and stamp.read_text() == "\n".join(wanted):
        return ""
    venv.create(folder, with_pip=True, clear=True, symlinks=True)
    # What this environment has is there too; what is installed above it comes first.
    above = [path for path in sys.path[1:] if path.endswith("site-packages")]
    [site] = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text("\n".join(above) + "\n")
    try:
        done = subprocess.run(
            [folder / "bin/python", "-m", "pip", "install", "--quiet", *wanted],
            capture_output=True, text=True, timeout=INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"not installed within {INSTALL_LIMIT_S:.0f} s"
    if done.returncode != 0:
        return f"not installed: {last_line(done.stderr)}"
    stamp.write_text("\n".join(wanted))
    return ""


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines
              if re.match(r"(\w+\.)*\w*(Error|Exception)\b|ERROR|fatal:", line)]
    return (errors or lines or ["it said nothing"])[-1][:200]


def version(folder: Path, package: str) -> str:
    name = re.split(r"[ @<>=\[]", package)[0]
    site = [str(path) for path in folder.glob("lib/python*/site-packages")]
    for distribution in importlib.metadata.distributions(name=name, path=[*site, *sys.path]):
        return distribution.version
    return "-"


def run(backend: str, folder: Path, program: Path, limit_s: float, show: bool) -> Outcome:
    command = [str(folder / "bin/python")]
    if backend == "hpcray":
        command += ["-m", "hpcray", "run", "--as-ray"]
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    libraries = os.pathsep.join(filter(None, [  # An MPI that pip has installed is there.
        str(Path(sys.prefix, "lib")), os.environ.get("LD_LIBRARY_PATH")]))
    begin_s = time.monotonic()
    process = subprocess.Popen(
        [*command, str(program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": libraries,
             "RAY_USAGE_STATS_ENABLED": "0"},
        start_new_session=True)
    try:
        said = process.communicate(timeout=limit_s)[0]
        why = "" if process.returncode == 0 else last_line(said)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[0]
        why = f"not done within {limit_s:.0f} s"
    seconds = time.monotonic() - begin_s
    if show and why:
        print(f"--- {program.stem} on {backend}\n{said}", file=sys.stderr)
    return Outcome(why, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backend", choices=["hpcray", "ray", "both"], default="both")
    parser.add_argument("--only", default="", help="programs whose name begins so, with commas")
    parser.add_argument("--venvs", type=Path, default=DEFAULT_VENVS, help="kept there")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds per program")
    parser.add_argument("--show", action="store_true", help="print what a failed program said")
    parser.add_argument("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    backends = ["hpcray", "ray"] if options.backend == "both" else [options.backend]
    programs = [program for program in sorted(PROGRAMS.glob("*.py"))
                if program.stem.startswith(tuple(options.only.split(",")))]
    if not programs:
        parser.error(f"no program in {PROGRAMS} begins with {options.only!r}")

    print(f"| program | package | version | {' | '.join(backends)} | why not |")
    print("|---|---|---|" + "---|" * (len(backends) + 1))
    found = {}
    for program in programs:
        wanted = requirements(program)
        folder = options.venvs.resolve() / program.stem
        missing = prepare(folder, wanted)
        outcomes = {
            backend: Outcome(missing, 0.0) if missing
            else run(backend, folder, program, options.limit, options.show)
            for backend in backends}
        why = "; ".join(sorted({
            outcome.why if missing else f"{backend}: {outcome.why}"
            for backend, outcome in outcomes.items() if outcome.why}))
        name, number = wanted[0].split(" ")[0], version(folder, wanted[0])
        cells = [outcomes[backend].cell() for backend in backends]
        print(f"| `{program.stem}` | {name} | {number} | {' | '.join(cells)} | {why} |", flush=True)
        found[program.stem] = {"package": name, "version": number, **{
            backend: outcome._asdict() for backend, outcome in outcomes.items()}}
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    # What Ray itself cannot run is no fault of hpcray, nor is what could not be installed.
    return int(any(
        row.get("hpcray", {}).get("why") and not row.get("ray", {}).get("why")
        for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
