"""Where a control store is: one small value that every rank gets from node 0.

Pure. It holds the password, so it travels by MPI or over a socketpair only: never in
argv, the environment or a log, which is why `repr` leaves the password out.
"""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import msgspec


class ControlAddress(msgspec.Struct, frozen=True, gc=False):
    """Either `unix_path` (one host) or `host` and `port` (several hosts)."""

    unix_path: str = ""
    host: str = ""
    port: int = 0
    username: str = ""
    password: str = ""
    database: int = 0
    tls: bool = False

    def __post_init__(self) -> None:
        if bool(self.unix_path) == bool(self.host):
            raise ValueError("a control store has either a socket path or a host, not both")
        if self.host and not 0 < self.port < 65536:
            raise ValueError(f"{self.port} is not a TCP port; a control store needs host:port")

    def __repr__(self) -> str:
        return f"ControlAddress({self})"

    def __str__(self) -> str:
        """For messages: where, never the password."""
        if self.unix_path:
            return f"unix://{self.unix_path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}/{self.database}"

    def to_bytes(self) -> bytes:
        """The whole address, password included, for MPI."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> ControlAddress:
        return msgspec.msgpack.decode(data, type=cls)

    @classmethod
    def from_url(cls, url: str) -> ControlAddress:
        """`redis://[user:password@]host[:port][/database]`, `rediss://`, or `unix://path`.

        Raises:
          ValueError: for any other scheme, or a URL that names no host or path.
        """
        parts = urlsplit(url)
        username, password = unquote(parts.username or ""), unquote(parts.password or "")
        if parts.scheme == "unix":
            database = int(parse_qs(parts.query).get("db", ["0"])[0])
            return cls(unix_path=unquote(parts.path), username=username, password=password,
                       database=database)
        if parts.scheme in ("redis", "rediss"):
            return cls(host=parts.hostname or "", port=parts.port or 6379, username=username,
                       password=password, database=int(parts.path.strip("/") or 0),
                       tls=parts.scheme == "rediss")
        raise ValueError(f"a control store URL starts with redis://, rediss:// or unix://, "
                         f"not {parts.scheme + '://' if parts.scheme else 'nothing'}")
