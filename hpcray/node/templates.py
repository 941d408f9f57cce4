"""Templates: who knows which, and when one can be forgotten. Pure.

    client --DefineTemplate--> here --TemplateDef--> nodes that run its tasks
           --ForgetTemplates-->     --ForgetTemplates-->

A program may make a template per task (`f.options(name=...)`). A client lets one go when nothing of
its program uses it any more; a node forgets it when no client and no other home uses it, no task
here was made of it, and nobody is told of its tasks. That is looked at rarely, and only when there
are many. Templates of methods stay: a call may pass by the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hpcray.node.outbox import Outbox
from hpcray.node.records import ClientRecord, TemplateStatistics
from hpcray.node.tables import Tables, unwired
from hpcray.protocol.messages import METHOD, ForgetTemplates, Template, TemplateDef

# So many that nobody uses may stay, for so long.
KEPT = 1000
_LOOK_S = 2.0


class Templates:
    def __init__(self, tables: Tables, outbox: Outbox) -> None:
        self._tables = tables
        self._templates = tables.templates
        self._outbox = outbox
        # Ports: a shape is new here; ids of templates that somebody still asks for; one is gone.
        self.learn: Callable[[tuple[tuple[str, int], ...]], None] = unwired
        self.asked_for: Callable[[], Iterable[bytes]] = unwired
        self.on_forgotten: list[Callable[[Template], None]] = []
        self._users: dict[bytes, int] = {}  # clients, and other homes
        self._of_peers: dict[int, set[bytes]] = {}  # what they have defined here
        self._told: dict[bytes, set[int]] = {}  # the nodes that know it from here
        self._unused: dict[bytes, None] = {}
        self._next_look_s = 0.0

    def define(self, template: Template) -> None:
        template_id = template.template_id
        if template_id not in self._templates:
            self.learn(template.resources)
            self._templates[template_id] = template
            self._tables.statistics[template_id] = TemplateStatistics()

    def from_client(self, client: ClientRecord, template: Template) -> None:
        self._use(client.templates, template)

    def from_peer(self, rank: int, template: Template) -> None:
        self._use(self._of_peers.setdefault(rank, set()), template)

    def _use(self, known: set[bytes], template: Template) -> None:
        template_id = template.template_id
        self.define(template)
        if template_id not in known:
            known.add(template_id)
            self._users[template_id] = self._users.get(template_id, 0) + 1
            self._unused.pop(template_id, None)

    def tell(self, rank: int, template: Template) -> None:
        """Before the first task of it that is bound to that node."""
        told = self._told.get(template.template_id)
        if told is None:
            told = self._told[template.template_id] = set()
        if rank not in told:
            told.add(rank)
            self._outbox.peers[rank].append(TemplateDef(template))

    # --- forgetting -------------------------------------------------------------------------------

    def client_lets_go(self, client: ClientRecord, template_ids: Iterable[bytes]) -> None:
        self._let_go(client.templates, template_ids)

    def peer_lets_go(self, rank: int, template_ids: Iterable[bytes]) -> None:
        self._let_go(self._of_peers.get(rank, set()), template_ids)

    def client_gone(self, client: ClientRecord) -> None:
        self._let_go(client.templates, list(client.templates))

    def node_lost(self, rank: int, _reason: str) -> None:
        known = self._of_peers.pop(rank, set())
        self._let_go(known, list(known))
        for told in self._told.values():
            told.discard(rank)

    def _let_go(self, known: set[bytes], template_ids: Iterable[bytes]) -> None:
        for template_id in template_ids:
            if template_id not in known:
                continue
            known.remove(template_id)
            self._users[template_id] -= 1
            if not self._users[template_id]:
                del self._users[template_id]
                if self._templates[template_id].kind != METHOD:
                    self._unused[template_id] = None

    def derived_from(self, template: Template) -> None:
        """What `template` was made of is gone, and with it its only user."""
        if template.template_id not in self._users:
            self._unused[template.template_id] = None

    def tick(self, now_s: float) -> None:
        """Forget, if that is worth a look at all tasks."""
        if len(self._unused) <= KEPT or now_s < self._next_look_s:
            return
        self._next_look_s = now_s + _LOOK_S
        tables = self._tables
        needed = {task.template.template_id for task in tables.tasks.values()}
        needed.update(home.template.template_id for home in tables.homes.values())
        needed.update(self.asked_for())
        for template_id in [one for one in self._unused if one not in needed]:
            del self._unused[template_id]
            template = self._templates.pop(template_id)
            for hear in self.on_forgotten:
                hear(template)
            del tables.statistics[template_id]
            for rank in sorted(self._told.pop(template_id, ())):
                self._outbox.peers[rank].append(ForgetTemplates((template_id,)))
