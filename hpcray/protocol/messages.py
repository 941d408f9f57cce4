"""Every message between processes: three tagged unions, grouped by conversation.

    client -> node     ToNode        a driver or worker asks, puts, submits, reports
    node   -> client   ToClient      only what the client asked for, and notices
    node   -> worker   ToWorker      the task channel: work, one way, can be taken back unread
    node  <-> node     ToPeer        over the transport, in order per peer

A datagram (or transport payload) is a msgpack array of messages. Structs are arrays on the wire
(no field names) and take no part in garbage collection: they hold bytes, ints and tuples only.

Conventions
  refs        joined 28-byte object ids: first the `dep_count` top-level arguments, then the refs
              nested in arguments.
  args        the packed value (args, kwargs) with top-level refs replaced by placeholders;
              NO_ARGS if there are none; ARGS_IN_DEP if it was too large: the first dep holds it.
  *_us        microseconds of wall time; *_bytes bytes; resources in ten-thousandths of a unit.
"""

from __future__ import annotations

from typing import Any

import msgspec

from hpcray.protocol.values import Failure

NO_ARGS = b""
ARGS_IN_DEP = b"*"

# Resource amounts are integers, so that the ledger is exact: 0.1 + 0.2 == 0.3.
UNIT = 10_000
STORE = "object_store_memory"  # a resource that no task asks for: what objects leave of it


class _Message(msgspec.Struct, array_like=True, gc=False):
    pass


# --- what tasks are made of ---------------------------------------------------------------------

WAIT, SPILL, FAIL = range(3)

TASK = 0
ACTOR_CREATION = 1
METHOD = 2

WORKING_DIR = 0
PY_MODULE = 1

NO_STREAM = 0
STREAM = 1
DYNAMIC = 2


class Template(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """What the calls of one remote function with the same options have in common.

    Sent once per channel before its first use; afterwards tasks name it by `template_id`.
    """

    template_id: bytes
    function_id: bytes  # of the function, or of the actor's class
    kind: int  # TASK, ACTOR_CREATION, METHOD
    name: str  # for people: "module.function" or "Class.method"
    method: str = ""  # METHOD: attribute to call
    return_count: int = 1
    # Sorted (resource, amount) pairs: needed to place it; held while it runs.
    resources: tuple[tuple[str, int], ...] = ()
    held_resources: tuple[tuple[str, int], ...] | None = None  # None: the same as `resources`
    max_retries: int = 0  # system failures; -1 without limit
    retry_exceptions: bool = False
    retry_only: bytes = b""  # of these exceptions only: a pickled tuple of classes
    # Placement: -1 anywhere, else a rank (hard unless soft).
    rank: int = -1
    soft: bool = False
    spread: bool = False  # deal out over all nodes, or those its soft label conditions prefer
    # Actor creation only.
    max_restarts: int = 0
    max_concurrency: int = 1
    is_async: bool = False
    groups: tuple[tuple[str, int], ...] = ()  # concurrency groups and their limits
    # METHOD only.
    group: str = ""  # the concurrency group it runs in
    unordered: bool = False  # may overtake calls whose arguments are not there yet
    # TASK and ACTOR_CREATION.
    env_vars: tuple[tuple[str, str], ...] = ()
    max_calls: int = 0  # TASK: the worker exits after this many; 0 without limit
    # Directories it runs with: (WORKING_DIR or PY_MODULE, object).
    packages: tuple[tuple[int, bytes], ...] = ()
    # Digest of env_vars and packages: a worker runs tasks of one environment. b"": the job's own.
    environment: bytes = b""
    group_id: bytes = b""  # the placement group it runs in
    captures: bool = False  # so do its children
    # Of a generator: NO_STREAM, STREAM (items as they come), DYNAMIC (all at the end).
    stream: int = 0
    stream_window: int = 0  # how far it may run ahead of its consumer; 0 without limit
    function_name: str = ""  # if `name` is one the user gave
    # With `rank`: what to do if that node has no room now. WAIT, SPILL, FAIL.
    unavailable: int = 0
    priority: int = 0  # TASK: in the queues of a node the highest goes first
    events: bool = True  # node/inventory.py tells of its tasks


class Located(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A value in this host's shared memory."""

    segment: int
    offset: int
    nbytes: int


class Remote(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A value that lies on other nodes."""

    nbytes: int
    ranks: tuple[int, ...]
    failed: bool = False  # it is an error


class Return(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """One return value (or yield) of a task, as its worker reports it."""

    value: bytes | Located
    contained: bytes = b""  # joined ids of the refs inside


# --- client -> node -----------------------------------------------------------------------------


class Hello(_Message, tag=1):
    pid: int
    # A driver says how it wants the job (config.InitConfig as plain data); a worker says nothing.
    config: dict[str, Any] | None = None


class DefineFunction(_Message, tag=2):
    """The pickled function or class. A large one is an object: then `blob` is empty."""

    function_id: bytes
    name: str
    blob: bytes
    object_id: bytes = b""


class DefineTemplate(_Message, tag=3):
    template: Template


class SubmitTask(_Message, tag=4):
    task_id: bytes
    template_id: bytes
    args: bytes
    refs: bytes = b""
    dep_count: int = 0


class SubmitCall(_Message, tag=5):
    """An actor method call. Calls of one process on one actor run in the order submitted."""

    task_id: bytes
    template_id: bytes
    actor_id: bytes
    args: bytes
    refs: bytes = b""
    dep_count: int = 0
    # The caller waits for its value, and sends it to this worker itself, behind this; -1: it does
    # not. If the actor is not there any more, the node sees to the call as to any other.
    worker: int = -1


class CreateActor(_Message, tag=6):
    actor_id: bytes
    template_id: bytes
    args: bytes
    refs: bytes
    dep_count: int
    name: str = ""
    namespace: str = ""
    detached: bool = False
    handle: bytes = b""  # what get_actor needs to build a handle (opaque to nodes)


class PutInline(_Message, tag=7):
    object_id: bytes
    value: bytes
    contained: bytes = b""


class PutLocated(_Message, tag=8):
    object_id: bytes
    location: Located
    contained: bytes = b""


class Hold(_Message, tag=9):
    """This process has its first local ref to each of these objects."""

    ids: bytes


class Drop(_Message, tag=10):
    """The last local ref to each is gone."""

    ids: bytes


class Unpin(_Message, tag=12):
    object_id: bytes
    count: int = 1


class PinForJob(_Message, tag=13):
    """A ref left our sight (pickled by the user, or inside a function): keep until the job ends."""

    ids: bytes


class Get(_Message, tag=14):
    """Send the values as they become available."""

    ids: bytes


class Watch(_Message, tag=15):
    """Say when each becomes ready; with `fetch`, when it is on this node too."""

    ids: bytes
    fetch: bool


class Done(_Message, tag=16):
    """A task finished with one small value that contains no refs: the common case."""

    task_id: bytes
    attempt: int
    run_us: int
    value: bytes
    # The client of this node that the worker sends the value itself, behind this; -1: nobody.
    sent_to: int = -1


class DoneMany(_Message, tag=17):
    task_id: bytes
    attempt: int
    run_us: int
    returns: tuple[Return, ...]


class Failed(_Message, tag=18):
    """The task raised. `error` is an ERROR (or, passed on, FAILURE) value for all its returns.

    A large one lies in shared memory if the task has one return, neither is a stream nor creates
    an actor, and is not to be retried.
    """

    task_id: bytes
    attempt: int
    run_us: int
    error: bytes | Located
    retry: bool = False  # its retry_exceptions cover this error


class Blocked(_Message, tag=19):
    """The worker waits in get/wait: it gives back its CPU and what it had read but not started."""

    unstarted: tuple[bytes, ...] = ()
    waits: bytes = b""  # joined ids of all it waits for; empty: unknown, or too many


class Unblocked(_Message, tag=20):
    pass


class SegmentRequest(_Message, tag=21):
    nbytes: int


class SegmentReturn(_Message, tag=22):
    segment: int


class SegmentOpen(_Message, tag=23):
    segment: int


class FetchTemplate(_Message, tag=24):
    """The worker meets a template for the first time; `home` knows it if this node does not."""

    template_id: bytes
    home: int


class Request(_Message, tag=25):
    """The slow path: everything that is asked rarely. See node/requests.py for the names."""

    request: int
    name: str
    arguments: Any = None


class EndJob(_Message, tag=26):
    """The driver is done; `status` is its exit status."""

    status: int
    park: bool = False


class ActorExit(_Message, tag=27):
    """The actor's worker is about to exit because its user said so (exit_actor)."""

    actor_id: bytes


class Yield(_Message, tag=28):
    """A generator task made its next item."""

    task_id: bytes
    index: int
    returned: Return


class StreamTaken(_Message, tag=29):
    """The consumer has taken so many items; told of streams with a window only."""

    task_id: bytes
    taken: int


class StreamDropped(_Message, tag=30):
    """The consumer wants no item from `taken` on."""

    task_id: bytes
    taken: int


class ValuesUnsent(_Message, tag=31):
    """These values could not be sent: that client's channel is full. The node sends them."""

    client: int
    ids: bytes


class CallUnsent(_Message, tag=32):
    """This call could not be sent: the actor's channel is full. The node sends it."""

    task_id: bytes


class CausalHeader(_Message, tag=33):
    """In front of a batch: what has passed between this process and others of its node since the
    last one (client/direct_calls.py)."""

    # What its earlier messages spoke of (`Done.sent_to`, `SubmitCall.worker`) has been sent.
    sent: bool
    # Processes it has heard from, and how many datagrams each had sent to the node before: what is
    # in them comes first.
    heard: tuple[tuple[int, int], ...] = ()


class Taken(_Message, tag=34):
    """Of the answer to this request: the client counts what it has held for it (`Reply.held`), or
    nobody waits for the answer any more."""

    request: int


class Preload(_Message, tag=82):
    """The driver has imported these: workers are to start with them. Its node tells all others."""

    modules: tuple[str, ...]


class ForgetTemplates(_Message, tag=83):
    """To the node, or to one that was told of them: nothing here uses these any more; whoever does
    again defines them again."""

    template_ids: tuple[bytes, ...]


ToNode = (
    Hello | DefineFunction | DefineTemplate | SubmitTask | SubmitCall | CreateActor | PutInline
    | PutLocated | Hold | Drop | Unpin | PinForJob | Get | Watch | Done | DoneMany | Failed
    | Blocked | Unblocked | SegmentRequest | SegmentReturn | SegmentOpen | FetchTemplate | Request
    | EndJob | ActorExit | Yield | StreamTaken | StreamDropped | ValuesUnsent | CallUnsent
    | CausalHeader | Taken | Preload | ForgetTemplates
)

# --- node -> client -----------------------------------------------------------------------------


class Welcome(_Message, tag=1):
    job_id: bytes
    rank: int
    size: int
    client: int  # this client's number on its node
    # Facts for people and for children: see node/server.py. With "refused" there is no session:
    # what `init` asked for cannot be, and why.
    session: dict[str, Any]


class Value(_Message, tag=2):
    object_id: bytes
    value: bytes
    # The worker that sends it itself, and how many datagrams it had sent to the node before; -1:
    # the node sends it.
    sender: int = -1
    sent: int = 0
    # Since it last answered this client, the sender has heard and said nothing else.
    sender_saw_nothing_new: bool = False


class ValueAt(_Message, tag=3):
    """Pinned for this client until it says Unpin."""

    object_id: bytes
    location: Located
    failed: bool = False  # it is an error


class Ready(_Message, tag=4):
    ids: bytes
    local: bool  # on this node, and not only somewhere


class Released(_Message, tag=5):
    """Ranges of the client's own segments are free again."""

    segment: int
    offsets: tuple[int, ...]


class SegmentGrant(_Message, tag=6):
    """One descriptor comes with the datagram."""

    segment: int
    nbytes: int


class SegmentDenied(_Message, tag=7):
    need_bytes: int
    used_bytes: int
    capacity_bytes: int
    retry: bool = False  # something was freed meanwhile: look again before giving up
    reason: str = ""  # if it is not the budget that is full: what else is missing on this host
    contents: str = ""  # what keeps the memory, in words


class SegmentOpened(_Message, tag=8):
    """One descriptor comes with the datagram."""

    segment: int
    nbytes: int


class SegmentClosed(_Message, tag=9):
    segment: int


class SegmentReclaim(_Message, tag=10):
    """Give back segments that are empty: others need the memory."""


class TemplateIs(_Message, tag=11):
    template: Template | None
    function: bytes  # the pickled function; empty: get `object_id`
    object_id: bytes = b""


class Reply(_Message, tag=12):
    request: int
    result: Any = None
    error: Failure | None = None
    # An object that the node holds for the client until it says Taken.
    held: bytes = b""


class Output(_Message, tag=13):
    """Lines for the driver's terminal, from one source."""

    prefix: str  # who said them
    lines: tuple[str, ...]
    error: bool = False  # for stderr


class CancelTask(_Message, tag=14):
    task_id: bytes


class CollectGarbage(_Message, tag=90):
    """To all processes of a node, and to all nodes: something is stuck that only refs and handles
    which nobody uses any more may keep from running; Python finds those in cycles when it likes."""


class InlineLimit(_Message, tag=16):
    """Values larger than this go to shared memory from now on: inline ones fill the node."""

    nbytes: int


class Yielded(_Message, tag=17):
    """An item of a stream is ready, and held for this process. `value`: if it is a small one."""

    task_id: bytes
    index: int
    value: bytes


class StreamEnded(_Message, tag=18):
    """There are no more items."""

    task_id: bytes


class StreamRoom(_Message, tag=19):
    """To the worker: so many items have been taken."""

    task_id: bytes
    taken: int


class JobEnded(_Message, tag=15):
    """Everything of the job is gone; nodes are parked (or leave). `reason`, if the driver did not
    end it: the sentence that people have been told already."""

    reason: str = ""


class ChannelOf(_Message, tag=20):
    """To a worker: by the descriptor that comes with the datagram it may send Values to that
    client, as the node does."""

    client: int


class ClientGone(_Message, tag=21):
    """That client has ended: its channels can be closed."""

    client: int


class ActorChannel(_Message, tag=22):
    """By the descriptor that comes with the datagram this client may send Runs to the worker of
    that actor, one at a time, as the node does."""

    actor_id: bytes
    worker: int


class Rows(_Message, tag=80):
    """A part of the answer to a request; its Reply comes behind the last."""

    request: int
    rows: list[Any]


ToClient = (
    Welcome | Value | ValueAt | Ready | Released | SegmentGrant | SegmentDenied | SegmentOpened
    | SegmentClosed | SegmentReclaim | TemplateIs | Reply | Output | CancelTask | InlineLimit
    | CollectGarbage | JobEnded | Yielded | StreamEnded | StreamRoom | Rows | ChannelOf | ClientGone
    | ActorChannel
)

# --- node -> worker, the task channel -----------------------------------------------------------


class Run(_Message, tag=1):
    """Run a task, create the actor, or call a method: the template's kind says which."""

    task_id: bytes
    template_id: bytes
    attempt: int
    args: bytes
    deps: tuple[bytes | Located, ...] = ()  # one per top-level ref argument, in order
    actor_id: bytes = b""
    devices: tuple[int, ...] = ()  # indices of the GPUs this lease holds
    ids: bytes = b""  # joined ids of those deps that are Located: pinned until done
    reply_to: int = -1  # the client of this node that waits for the value; -1: none, or others too
    # The client that sends it itself, and how many datagrams it had sent to the node before; -1:
    # the node sends it.
    sender: int = -1
    sent: int = 0


class Stop(_Message, tag=2):
    """Finish what is queued and exit in good order."""


ToWorker = Run | Stop

# --- node <-> node ------------------------------------------------------------------------------


class Gpus(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """The GPUs that one rank sees."""

    ids: tuple[str, ...] = ()  # as visible-devices variables take them
    variable: str = "CUDA_VISIBLE_DEVICES"  # by which a process is shown some of them
    named: bool = False  # that variable was set: there are no others
    own: bool = False  # the batch system has bound them to this rank


class Joined(_Message, tag=1):
    """A node introduces itself to node 0; node 0 repeats all of them to everybody."""

    rank: int
    host: str
    address: str
    pid: int
    resources: tuple[tuple[str, int], ...]
    labels: tuple[tuple[str, str], ...] = ()
    gpus: Gpus = Gpus()


class Begin(_Message, tag=2):
    """Node 0: the job starts. `facts` is what every node must know (node/beginning.py)."""

    job_id: bytes
    facts: bytes


class Ending(_Message, tag=3):
    """Node 0: the job is over; end its processes and forget it."""

    park: bool


class Ended(_Message, tag=4):
    """To node 0: that rank's processes of the job are gone. `reason`, if it was not told to end."""

    rank: int
    reason: str = ""


class Leave(_Message, tag=47):
    """Node 0: everybody has ended, and the driver has heard all; end MPI and go."""


class TemplateDef(_Message, tag=5):
    """Precedes the first task that names it on this channel."""

    template: Template


class FetchFunction(_Message, tag=6):
    function_id: bytes


class FunctionDef(_Message, tag=7):
    function_id: bytes
    name: str
    blob: bytes
    object_id: bytes = b""


class Assign(_Message, tag=8):
    """The home binds a task to a node. Every assignment of a task has its own attempt number."""

    task_id: bytes
    template_id: bytes
    attempt: int
    args: bytes
    deps: tuple[bytes | Remote, ...] = ()
    dep_ids: bytes = b""


class AssignCall(_Message, tag=9):
    """An actor call, from the caller's node to the actor's."""

    task_id: bytes
    template_id: bytes
    attempt: int
    actor_id: bytes
    incarnation: int
    caller: int  # client number at the sending node: order is kept per (rank, caller)
    args: bytes
    deps: tuple[bytes | Remote, ...] = ()
    dep_ids: bytes = b""


class TaskDone(_Message, tag=10):
    task_id: bytes
    attempt: int
    run_us: int
    value: bytes


class PeerReturn(msgspec.Struct, array_like=True, gc=False, frozen=True):
    value: bytes  # empty: the executor keeps `nbytes` in its shared memory
    nbytes: int = 0
    contained: bytes = b""


class TaskDoneMany(_Message, tag=11):
    task_id: bytes
    attempt: int
    run_us: int
    returns: tuple[PeerReturn, ...]
    handover: int = 0  # answer HandedOver when the homes of `contained` know of you; 0: none needed


class TaskFailed(_Message, tag=12):
    task_id: bytes
    attempt: int
    run_us: int
    error: bytes  # empty: the executor keeps `nbytes` in its shared memory, as of a PeerReturn
    retry: bool
    nbytes: int = 0


class TaskCrashed(_Message, tag=13):
    """The worker died under it, or the actor died before or while it ran."""

    task_id: bytes
    attempt: int
    failure: Failure
    started: bool = True


class TaskReturned(_Message, tag=14):
    """Not started and given back: bind it again. `gone`: the actor is not here (any more)."""

    task_id: bytes
    attempt: int


class HolderAdd(_Message, tag=15):
    """I hold refs of these objects of yours. `turn` names it in your answer (node/holders.py)."""

    ids: bytes
    turn: int


class HolderAdded(_Message, tag=16):
    """Answers one HolderAdd; they are answered in order."""

    turn: int


class HolderDrop(_Message, tag=17):
    ids: bytes


class HandedOver(_Message, tag=18):
    handover: int


class Want(_Message, tag=19):
    """Tell me when these are ready: ObjectReady, once each."""

    ids: bytes


class ObjectReady(_Message, tag=20):
    object_id: bytes
    value: bytes | Remote


class PullRequest(_Message, tag=21):
    """The receives are posted; send. Or, `mapped`: we are on your host; say where it lies."""

    object_id: bytes
    transfer: int
    mapped: bool = False


class PullMapped(_Message, tag=38):
    """Copy it yourself from this descriptor of mine; I keep it in place until PullEnded."""

    object_id: bytes
    transfer: int
    pid: int
    descriptor: int
    segment_nbytes: int
    location: Located
    # What the descriptor refers to: in another PID namespace the same pid is another process.
    device: int
    inode: int


class PullEnded(_Message, tag=39):
    object_id: bytes


class TaskYield(_Message, tag=40):
    """Executor to home: an item. `handover` as in TaskDoneMany."""

    task_id: bytes
    index: int
    returned: PeerReturn
    handover: int = 0


class TaskRoom(_Message, tag=41):
    """Home to executor: so many items have been taken."""

    task_id: bytes
    taken: int


class PrepareBundles(_Message, tag=42):
    """Node 0: hold these bundles of a placement group, all or none; say BundlesPrepared."""

    group: bytes
    bundles: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]


class BundlesPrepared(_Message, tag=43):
    group: bytes
    ok: bool


class CommitBundles(_Message, tag=44):
    """Node 0: everybody has prepared; the group's tasks may come."""

    group: bytes


class ReleaseBundles(_Message, tag=45):
    """Node 0: somebody could not; let go."""

    group: bytes


class GroupRemoved(_Message, tag=46):
    """Node 0, to those that hold bundles or ask for room: end what runs in it, fail what waits."""

    group: bytes


class PullRefused(_Message, tag=22):
    object_id: bytes
    transfer: int


class CopyAdded(_Message, tag=23):
    object_id: bytes


class FreeCopies(_Message, tag=24):
    ids: bytes


class Load(_Message, tag=25):
    """To the global scheduler: what this node could start now, and how busy it is."""

    free: tuple[tuple[str, int], ...]
    queued: int
    actors: int  # here, or about to be
    placed: int = 0  # actors that have come by grants so far
    store: int = 0  # what objects leave of STORE: told along


class Demand(_Message, tag=26):
    """To the global scheduler: tasks of this shape wait here for room."""

    shape: tuple[tuple[str, int], ...]
    count: int
    actor: bool = False
    spread: bool = False


class Grant(_Message, tag=27):
    """From the global scheduler to a home: bind up to `slots` such tasks to `rank`."""

    rank: int
    shape: tuple[tuple[str, int], ...]
    slots: int
    actor: bool = False
    spread: bool = False


class GrantUnused(_Message, tag=60):
    """To the global scheduler: what waited has gone elsewhere meanwhile; the room is free still."""

    rank: int
    shape: tuple[tuple[str, int], ...]
    slots: int
    actor: bool


class ActorWhere(_Message, tag=28):
    """To the actor's home: tell me where it is, now and whenever that changes."""

    actor_id: bytes


class ActorIs(_Message, tag=29):
    actor_id: bytes
    state: int
    rank: int
    incarnation: int
    failure: Failure | None = None


class ActorStop(_Message, tag=30):
    """Home to host. `kill`: at once, without running what is queued."""

    actor_id: bytes
    incarnation: int
    kill: bool
    restarts: bool = False  # another incarnation follows


class ActorDown(_Message, tag=31):
    """Host to home: the actor's worker is gone."""

    actor_id: bytes
    incarnation: int
    failure: Failure
    intended: bool


class PeerRequest(_Message, tag=32):
    """The slow path between nodes; mirrors Request."""

    request: int
    name: str
    arguments: Any = None


class PeerReply(_Message, tag=33):
    request: int
    result: Any = None
    error: Failure | None = None


class PeerOutput(_Message, tag=34):
    """Worker output on its way to the driver's node."""

    name: str
    pid: int
    stream: int
    chunk: bytes


class Notice(_Message, tag=35):
    """A warning for the driver's terminal."""

    text: str


class RecallTask(_Message, tag=36):
    """Home to executor: the task was cancelled; drop it if unstarted, else interrupt it."""

    task_id: bytes
    force: bool = False
    recursive: bool = False


class GiveBack(_Message, tag=37):
    """Home to executor: others are idle; return up to `count` of my tasks you have not started."""

    shape: tuple[tuple[str, int], ...]
    count: int


class PeerRows(_Message, tag=80):
    """A part of the answer to a PeerRequest; its PeerReply comes behind the last."""

    request: int
    rows: list[Any]


class ActorAt(_Message, tag=81):
    """Host to home: the process the actor lives in, for those who list actors."""

    actor_id: bytes
    incarnation: int
    pid: int


ToPeer = (
    Joined | Begin | Ending | Ended | Leave | TemplateDef | FetchFunction | FunctionDef | Assign
    | AssignCall
    | TaskDone | TaskDoneMany | TaskFailed | TaskCrashed | TaskReturned | HolderAdd | HolderAdded
    | HolderDrop | HandedOver | Want | ObjectReady | PullRequest | PullRefused | CopyAdded
    | FreeCopies
    | Load | Demand | Grant | GrantUnused
    | ActorWhere | ActorIs | ActorStop | ActorDown | PeerRequest | PeerReply
    | PeerOutput | Notice | RecallTask | GiveBack | PullMapped | PullEnded | TaskYield | TaskRoom
    | PrepareBundles | BundlesPrepared | CommitBundles | ReleaseBundles | GroupRemoved
    | PeerRows | ActorAt | Preload | CollectGarbage | ForgetTemplates
)

encode = msgspec.msgpack.Encoder().encode
# To the node, in front of a datagram whose content is in memory: no messages.
ANNOUNCEMENT = encode([])
encode_into = msgspec.msgpack.Encoder().encode_into
decode_to_node = msgspec.msgpack.Decoder(list[ToNode]).decode
decode_to_client = msgspec.msgpack.Decoder(list[ToClient]).decode
decode_to_worker = msgspec.msgpack.Decoder(list[ToWorker]).decode
decode_to_peer = msgspec.msgpack.Decoder(list[ToPeer]).decode
