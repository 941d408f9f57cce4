"""The states of a task, and what leads from one to another. Pure data; `node/tasks.py` shows it.

A task has a record at its home, and one where it runs if that is another rank. Both follow the
table. The one at an executor begins ASSIGNED: it comes bound. A record whose task has a value is
dropped in the state it is in, for the sake of speed; only who tells people of it makes one up that
is FINISHED (`node/inventory.py`).
"""

from __future__ import annotations

from hpcray.node.states import Edge, State, Table


class TaskState(State):
    WAITING = 0, "some dependency is not ready"
    QUEUED = 1, "unbound in a queue of its home, or in the executor's"
    FETCHING = 2, "bound to this node; dependencies are on their way"
    ASSIGNED = 3, "bound to another rank or to an actor; at the executor: it has just come"
    RUNNING = 4, "sent to a worker of this node"
    FINISHED = 5, "it has a value, and its record is gone: this one tells of it"
    FAILED = 6, "its outcome is an error; its record tells of it"


WAITING, QUEUED, FETCHING, ASSIGNED, RUNNING, FINISHED, FAILED = TaskState

# At the home.
READY = Edge("its dependencies exist", (WAITING,), QUEUED)
ASSIGN = Edge("it is bound to another rank", (QUEUED,), ASSIGNED)
RETURNED = Edge("its executor gave it back, not started", (ASSIGNED, FETCHING), QUEUED)
RETRY = Edge("its attempt failed, and it has another", (ASSIGNED, RUNNING), QUEUED)
FAIL = Edge("its outcome is an error", (WAITING, QUEUED, FETCHING, ASSIGNED, RUNNING), FAILED)
# Calls, at the home.
SEND = Edge("it is sent to its actor", (WAITING, QUEUED), ASSIGNED)
CALLED = Edge("its caller hands it to the actor's worker itself", (WAITING,), RUNNING)
UNSENT = Edge("its caller could not hand it over", (RUNNING,), ASSIGNED)
# At the executor, which may be the home.
ARRIVED = Edge("its home has bound it to this node", (ASSIGNED,), QUEUED)
FETCH = Edge("it needs what is not here", (QUEUED, ASSIGNED), FETCHING)
FETCHED = Edge("all it needs is here", (FETCHING,), QUEUED)
CALL_FETCHED = Edge("all that the call needs is here", (FETCHING,), ASSIGNED)
RUN = Edge("it is given to a worker", (QUEUED, ASSIGNED), RUNNING)
TAKEN_BACK = Edge("its worker had not read it", (RUNNING,), QUEUED)
# Of a record that is made up.
TOLD = Edge("people ask for it", (WAITING,), FINISHED)

TASKS = Table("a task", TaskState, (
    READY, ASSIGN, RETURNED, RETRY, FAIL, SEND, CALLED, UNSENT,
    ARRIVED, FETCH, FETCHED, CALL_FETCHED, RUN, TAKEN_BACK, TOLD))

# The stories of new records.
SUBMITTED = TASKS.story(WAITING)  # at the home
BOUND = TASKS.story(ASSIGNED)  # at the executor
