"""The states of an actor at its home and at a caller's node, and what leads from one to another.

Pure data. `node/actor_homes.py` and `node/actor_routes.py` show the tables.
"""

from __future__ import annotations

from hpcray.node.states import Edge, State, Table


class ActorState(State):
    """At the home. Travels in `ActorIs.state`; the order means nothing."""

    PENDING = 1, "its first constructor has not returned"
    ALIVE = 2, "its host takes calls"
    RESTARTING = 3, "its worker is gone; another constructor has not returned"
    DEAD = 4, "there is no worker, and there will be none"


_PENDING, _ALIVE, _RESTARTING, _DEAD = ActorState

CREATED = Edge("its constructor has returned", (_PENDING, _RESTARTING), _ALIVE)
RESTART = Edge(
    "its worker is gone, it has restarts left", (_PENDING, _ALIVE, _RESTARTING), _RESTARTING)
REFUSED = Edge("its constructor raised, or cannot run", (_PENDING, _RESTARTING), _DEAD)
KILLED = Edge("it was killed before it was there", (_PENDING, _RESTARTING), _DEAD)
GONE = Edge("its worker is gone for good", (_PENDING, _ALIVE, _RESTARTING), _DEAD)

ACTORS = Table("an actor", ActorState, (CREATED, RESTART, REFUSED, KILLED, GONE))
NEW_ACTOR = ACTORS.story(_PENDING)


class RouteState(State):
    """At a caller's node: what it was told. Four have the names and numbers of the home's."""

    UNKNOWN = 0, "the home is to tell; calls wait"
    PENDING = 1, "it is not there yet; calls wait"
    ALIVE = 2, "calls go to its host"
    RESTARTING = 3, "calls with retries wait, others fail"
    DEAD = 4, "calls fail"
    SETTLING = 5, "it is there again; calls wait until its last incarnation has answered"


UNKNOWN, PENDING, ALIVE, RESTARTING, DEAD, SETTLING = RouteState

# The home answers once, and then tells each change: nothing is told twice.
TOLD_PENDING = Edge("told: not there yet", (UNKNOWN,), PENDING)
TOLD_ALIVE = Edge("told: there", (UNKNOWN, PENDING, RESTARTING), ALIVE)
TOLD_AGAIN = Edge(
    "told: there, and calls are open at another incarnation", (RESTARTING,), SETTLING)
SETTLED = Edge("all calls of before are answered", (SETTLING,), ALIVE)
TOLD_RESTARTING = Edge(
    "told: it restarts", (UNKNOWN, PENDING, ALIVE, RESTARTING, SETTLING), RESTARTING)
TOLD_DEAD = Edge("told: dead", (UNKNOWN, PENDING, ALIVE, RESTARTING, SETTLING), DEAD)
DOUBTED = Edge("a call came back", (ALIVE,), UNKNOWN)

ROUTES = Table("a route", RouteState, (
    TOLD_PENDING, TOLD_ALIVE, TOLD_AGAIN, SETTLED, TOLD_RESTARTING, TOLD_DEAD, DOUBTED))
NEW_ROUTE = ROUTES.story(UNKNOWN)
