"""All parties of many migrations as a model: berths, server, agents, coordinators and the log between them.

Only the state machine is the real one. The rest does, without time and without I/O, what these do: services/*/,
shared/quicferry/bus/agent.py, bus/log.py and bus/tidying.py, host/source.py and host/target.py, quic/mover.py and
quic/hold.py.
Steps are generators: whatever yields can be overtaken, cancelled or killed there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import Any, Literal

from quicferry.migration.commands import ArmServer, CallAgent, Command, Decide, Place, StartTimer, StopTimer, Unlock
from quicferry.migration.machine import Phase, State, handle, outstanding
from quicferry.protocol import events as ev
from quicferry.protocol.api import Address, Options
from quicferry.protocol.api import Place as Berth
from quicferry.protocol.errors import ErrorBody

Step = Generator[str, None, None]
"""Yields ``go`` where others may come between, ``wait`` where it can't go on yet."""
ENDS = {"completed", "rolled_back", "failed"}
PERSISTENT = (Phase.RESUMING, Phase.ABORTING)
BERTHS = {name: Berth(node="n", berth=name, address=Address(host="127.0.0.1", port=1)) for name in "ab"}


class StepError(Exception):
    """A step's, or a request's, error; its text is its code."""


@dataclass
class Log:
    """One stream: message ids make repeats harmless while they are remembered, decisions come after one another."""

    entries: list[ev.AnyEvent] = field(default_factory=list)
    decided: dict[str, int] = field(default_factory=dict)
    remembered: dict[str, ev.AnyEvent] = field(default_factory=dict)

    def append(self, event: ev.AnyEvent) -> None:
        if ev.message_id(event) not in self.remembered:
            self.entries.append(event)
            self.remembered[ev.message_id(event)] = event

    def decide(self, event: ev.Decision, after: int) -> None:
        if self.decided.get(event.id, 0) != after:
            raise StepError("log_conflict")
        self.append(event)
        self.decided[event.id] = len(self.entries)

    def forget(self, keep: int) -> None:
        """What was acknowledged and not yet on the disk is gone: all but the first ``keep`` entries."""
        del self.entries[keep:]
        self.remembered = {ev.message_id(event): event for event in self.entries}
        numbered = enumerate(self.entries, start=1)
        self.decided = {event.id: number for number, event in numbered if isinstance(event, ev.Decision)}

    def decisions(self, migration: str) -> list[str]:
        names = [ev.kind(e) for e in self.entries if e.id == migration]
        return [name.removeprefix("decision.") for name in names if name.startswith("decision.")]


@dataclass(eq=False)
class Server:
    """One copy of the server process."""

    state: Literal["running", "held", "frozen", "restored"] = "running"
    socket: bool = True
    armed: str = ""
    moving: str = ""
    """The move it has told its clients of; until it is held, it can be called off."""
    over: frozenset[str] = frozenset()
    """Moves that are over here, and are not armed again."""
    says: list[ev.AnyEvent] = field(default_factory=list)

    def arm(self, migration: str) -> None:
        if self.moving == migration:
            return
        if self.moving:
            raise StepError("service_busy")
        if migration in self.over:
            raise StepError("too_late")
        self.armed = migration

    def disarm(self, migration: str) -> None:
        if self.armed == migration:
            self.armed = ""
        if self.moving == migration:
            self.moving = ""
        self.over |= {migration}

    def adopt(self, migration: str, outcome: Literal["moved", "rolled_back"]) -> None:
        assert self.moving == migration, "one migration's socket for a server that another one holds"
        self.state, self.socket, self.moving = "running", True, ""
        self.over |= {migration}
        self.says += [ev.Adopted(id=migration, at_ms=0, outcome=outcome, still_ms=1)]
        if outcome == "moved":
            self.says += [ev.ClientArrived(id=migration, at_ms=0, client="c1", source="wrapper", interruption_ms=1)]


@dataclass(eq=False)
class Side:
    """What an agent has open for one migration: host/source.py's Source, host/target.py's Target."""

    request: ev.Requested
    berth: str
    ready: bool = False
    criu: bool = False
    udp: bool = False
    told: bool = False
    dumped: bool = False
    heap: bool = False
    server: Server | None = None


@dataclass(eq=False)
class Run:
    """One step of one migration at an agent."""

    key: tuple[str, str, int]
    attempt: int
    step: Step
    before: list[Run]
    events: list[ev.AnyEvent] = field(default_factory=list)
    failed: bool = False
    running: bool = True


class World:
    """Everything there is. What is not killed lives; what is not closed stays open."""

    def __init__(self) -> None:
        self.log = Log()
        self.berths: dict[str, Server | None] = {"a": Server(), "b": None}
        self.docks: dict[str, Side] = {}
        """Who listens in a berth for a server's hand-over: one at a time."""
        self.images: dict[str, bool] = {}
        """Of each migration, whether they are complete."""
        self.begun: set[str] = set()
        """Migrations whose restore was begun; the note lies beside the images."""
        self.agents = {"checkpoint": Agent(self, "checkpoint"), "restore": Agent(self, "restore")}
        self.coordinators = [Coordinator(self), Coordinator(self)]
        self.killed: list[Run] = []
        """Runs killed in the middle. Kept, for a generator that is thrown away still does its ``finally``."""
        self.lock = ""
        self.placed = 0
        """The epoch in the placement bucket."""

    @property
    def serving(self) -> list[str]:
        return [name for name, server in self.berths.items() if server and server.state == "running"]

    def open_dock(self, side: Side, *, udp: bool) -> None:
        """Raises StepError ``port_taken`` as Dock.open and bind_parked do."""
        here = self.berths[side.berth]
        taken = self.docks.get(side.berth)
        if taken not in (None, side) or (udp and not side.udp and here and here.socket):
            raise StepError("port_taken")
        self.docks[side.berth] = side
        side.udp = side.udp or udp

    def close(self, side: Side) -> None:
        """Close all that is open; CRIU's end lets its processes run, without a socket."""
        if self.docks.get(side.berth) is side:
            del self.docks[side.berth]
        server = side.server
        if side.criu and server is not None and server.state in ("frozen", "restored"):
            server.state = "held"
        side.criu = side.udp = side.heap = False
        side.server = None

    def actions(self) -> list[Callable[[], None]]:
        """Everything that could happen next without a fault and without time passing."""
        found: list[Callable[[], None]] = []
        for coordinator in self.coordinators:
            found += coordinator.actions()
        for agent in self.agents.values():
            found += agent.actions()
        for name, server in self.berths.items():
            if server is not None and server.state == "running":
                if server.moving:
                    found.append(lambda server=server, name=name: self._park(name, server))  # type: ignore[misc]
                if server.says:
                    found.append(lambda server=server: self.log.append(server.says.pop(0)))  # type: ignore[misc]
        return found

    def lose_power(self, keep: int) -> None:
        """NATS's host only: agents end what they are at, the log comes back with what was on the disk."""
        for coordinator in self.coordinators:
            coordinator.die()
        while busy := [(agent, run) for agent in self.agents.values() for run in agent.going()]:
            agent, run = busy[0]
            agent.advance(run)
        self.log.forget(keep)

    def sigterm(self, berth: str) -> None:
        """quic/server.py: an armed server begins its move, a moving one ignores it, another one stops."""
        server = self.berths[berth]
        if server is None or server.state not in ("running", "held"):
            return
        if server.state == "running" and server.armed:
            server.moving, server.armed = server.armed, ""
            server.says += [
                ev.MigrateSent(id=server.moving, at_ms=0, clients=1),
                ev.AckSeen(id=server.moving, at_ms=0, client="c1", after_ms=1),
            ]
        elif not (server.state == "running" and server.moving):
            self.berths[berth] = None

    def _park(self, berth: str, server: Server) -> None:
        dock = self.docks.get(berth)
        if dock is None or dock.server is not server or dock.udp:
            server.over |= {server.moving}
            server.moving = ""  # nobody takes the socket: it is called off
            return
        server.state, server.socket = "held", False
        dock.udp = True


class Agent:
    """bus/agent.py and the steps of one role."""

    def __init__(self, world: World, role: Literal["checkpoint", "restore"]) -> None:
        self.world, self.role = world, role
        self.alive = True
        self.runs: dict[tuple[str, str, int], Run] = {}
        self.sides: dict[str, Side] = {}
        self.found: set[str] = set()
        self.unpublished: list[ev.AnyEvent] = []

    def die(self) -> None:
        """SIGKILL. What CRIU held goes on, mute."""
        for side in [*self.sides.values(), *self._loose()]:
            self.world.close(side)
        self.world.killed += self.runs.values()
        self.runs.clear()
        self.sides.clear()
        self.unpublished.clear()
        self.alive = False

    def start(self) -> None:
        """bus/tidying.py: the images that are there now go when their migrations have ended."""
        self.alive = True
        self.found = set(self.world.images) if self.role == "restore" else set()

    def _tidy(self, migration: str) -> None:
        self.found.discard(migration)
        self.world.images.pop(migration, None)
        self.world.begun.discard(migration)

    def _may_tidy(self, migration: str) -> bool:
        busy = any(run.running for run in self.runs.values() if run.key[0] == migration)
        return not busy and bool(ENDS & set(self.world.log.decisions(migration)))

    def _loose(self) -> list[Side]:
        """Sides that a running step has opened and not handed on yet."""
        return [
            side
            for side in self.world.docks.values()
            if (side.berth == side.request.target.berth) == (self.role == "restore")
        ]

    def accept(self, request: ev.Requested, verb: str, attempt: int, round_: int) -> None:
        """Raises StepError when it refuses, or is not there."""
        if not self.alive:
            raise StepError("no_answer")
        if verb != "abort" and (request.id, "abort", 0) in self.runs:
            raise StepError("too_late")
        key = (request.id, verb, round_)
        known = self.runs.get(key)
        if known is None or (known.failed and attempt > known.attempt and not known.running):
            before = [run for run in self.runs.values() if run.key[0] == request.id and run.running]
            step = getattr(self, f"_{self.role}_{verb}")
            run = Run(key, attempt, iter(()), before)  # type: ignore[arg-type]
            run.step = step(run, request)
            self.runs[key] = run
        elif not known.running:
            self.unpublished += known.events

    def actions(self) -> list[Callable[[], None]]:
        if not self.alive:
            return []
        found: list[Callable[[], None]] = []
        if self.unpublished:
            found.append(lambda: self.world.log.append(self.unpublished.pop(0)))
        over = [migration for migration in sorted(self.found) if self._may_tidy(migration)]
        found += [lambda migration=migration: self._tidy(migration) for migration in over]  # type: ignore[misc]
        found += [lambda run=run: self.advance(run) for run in self.going()]  # type: ignore[misc]
        return found

    def going(self) -> list[Run]:
        """Runs that need nobody else for their next turn."""
        found = []
        for run in self.runs.values():
            waits = run.key[1] != "abort" and any(other.running for other in run.before)
            if run.running and not waits and self._ready(run):
                found.append(run)
        return found

    def _ready(self, run: Run) -> bool:
        """Whether it would not just wait; looked at before it begins to as well."""
        side = self.sides.get(run.key[0])
        if side is None:
            return True
        if run.key[1] == "dump" and side.told and not side.udp and side.server is not None:
            return side.server not in self.world.berths.values()
        if run.key[1] == "restore" and side.ready:
            return self.world.images.get(run.key[0], False)
        return True

    def waiting(self) -> list[Run]:
        """Runs that wait for somebody else, and will not for ever."""
        return [run for run in self.runs.values() if run.running and not self._ready(run)]

    def give_up(self, run: Run, code: str) -> None:
        """The run's own limit has passed."""
        run.step.close()
        self._failed(run, code)

    def advance(self, run: Run) -> None:
        if run.key[1] == "abort":
            for other in run.before:
                if other.running:
                    other.running = False
                    other.step.close()
            run.before = []
        try:
            next(run.step)
        except StopIteration:
            run.running = False
        except StepError as error:
            self._failed(run, str(error))

    def _failed(self, run: Run, code: str) -> None:
        run.running, run.failed = False, True
        kind = ev.CheckpointFailed if self.role == "checkpoint" else ev.RestoreFailed
        error = ErrorBody(code=code, message="It did not work.")
        self._say(run, kind(id=run.key[0], at_ms=0, verb=run.key[1], attempt=run.attempt, error=error))

    def _say(self, run: Run, event: ev.AnyEvent) -> None:
        run.events.append(event)
        self.unpublished.append(event)

    # The checkpoint agent's steps: host/source.py.

    def _checkpoint_prepare(self, run: Run, request: ev.Requested) -> Step:
        world, side = self.world, Side(request, request.source.berth)
        yield "go"
        side.server = world.berths[side.berth]
        if side.server is None:
            raise StepError("server_gone")
        world.open_dock(side, udp=False)
        try:
            side.criu = side.heap = True
            yield "go"
            side.ready = True
            world.images.setdefault(request.id, False)
        except BaseException:
            world.close(side)
            raise
        self.sides[request.id] = side
        self._say(run, ev.SourceReady(id=request.id, at_ms=0, image="i", rss_bytes=1))

    def _checkpoint_pre_dump(self, run: Run, request: ev.Requested) -> Step:
        side = self._prepared(request)
        yield "go"
        if side.server is None or side.server.state != "running":
            raise StepError("criu_failed")
        number = run.key[2]
        self._say(run, ev.PreDumped(id=request.id, at_ms=0, round=number, pages=1000 // number, took_ms=1))

    def _checkpoint_dump(self, run: Run, request: ev.Requested) -> Step:
        world, side = self.world, self._prepared(request)
        server = side.server
        yield "go"  # CRIU gets its request first
        side.told = True
        world.sigterm(side.berth)
        while not side.udp:
            if server not in world.berths.values():
                raise StepError("server_gone")
            yield "wait"
        self._say(run, ev.SourceHeld(id=request.id, at_ms=0, waited_ms=1))
        yield "go"
        assert server is not None
        server.state = "frozen"
        yield "go"
        side.dumped = world.images[request.id] = True
        self._say(run, ev.Dumped(id=request.id, at_ms=0, pages=1, image_bytes=1, took_ms=1))

    def _checkpoint_release(self, run: Run, request: ev.Requested) -> Step:
        side = self.sides.get(request.id)
        yield "go"
        if side is not None and side.criu:
            self._kill(side.server)
        else:
            left = self.world.berths[request.source.berth]
            if left is not None and left.state == "held":
                self._kill(left)
        if side is not None:
            self.world.close(side)
        self.sides.pop(request.id, None)
        self._say(run, ev.SourceGone(id=request.id, at_ms=0))

    def _checkpoint_abort(self, run: Run, request: ev.Requested) -> Step:
        world = self.world
        side = self.sides.get(request.id) or Side(request, request.source.berth)
        yield "go"
        try:
            server = side.server or world.berths[side.berth]
            if server is not None and server not in world.berths.values():
                server = None
            if side.criu and server is not None and server.state == "frozen":
                server.state = "held"
            side.criu = False
            if world.docks.get(side.berth) is side:
                del world.docks[side.berth]
            yield "go"
            if server is not None and (side.udp or server.state == "held"):
                world.open_dock(side, udp=True)
                yield "go"
                if server in world.berths.values() and server.state == "held":
                    side.udp = False  # handed out
                    server.adopt(request.id, "rolled_back")
        finally:
            world.close(side)
        world.images.pop(request.id, None)
        self.sides.pop(request.id, None)
        self._say(run, ev.SourceBack(id=request.id, at_ms=0))

    # The restore agent's steps: host/target.py.

    def _restore_prepare(self, run: Run, request: ev.Requested) -> Step:
        side = Side(request, request.target.berth)
        yield "go"
        try:
            self._open_target(side)
            yield "go"
        except BaseException:
            self.world.close(side)
            raise
        self.sides[request.id] = side
        self._say(run, ev.TargetReady(id=request.id, at_ms=0, image="i"))

    def _open_target(self, side: Side) -> None:
        if self.world.berths[side.berth] is not None:
            raise StepError("berth_busy")
        self.world.images.setdefault(side.request.id, False)
        self.world.open_dock(side, udp=True)
        side.ready = side.criu = True
        side.heap = self.world.berths[side.request.source.berth] is not None

    def _restore_restore(self, run: Run, request: ev.Requested) -> Step:
        side = self._prepared(request)
        while not self.world.images.get(request.id):
            yield "wait"
        yield "go"
        self._rebuild(side)
        self._say(run, ev.Restored(id=request.id, at_ms=0, took_ms=1))
        yield "go"  # CRIU's last stage

    def _rebuild(self, side: Side) -> None:
        world, request = self.world, side.request
        if not world.images.get(request.id):
            raise StepError("internal")
        if not side.heap:
            raise StepError("heap_gone")
        world.begun.add(request.id)
        original = world.berths[request.source.berth]
        over = original.over if original is not None else frozenset()
        side.server = Server(state="restored", socket=False, moving=request.id, over=over)
        world.berths[side.berth] = side.server

    def _restore_resume(self, run: Run, request: ev.Requested) -> Step:
        world = self.world
        assert "committed" in world.log.decisions(request.id), "resumed before the commit"
        side = self.sides.setdefault(request.id, Side(request, request.target.berth))
        yield "go"
        if side.server is not None and side.server not in world.berths.values():
            world.close(side)  # stand_by saw it die; _catch_up begins anew
        if side.server is None or world.docks.get(side.berth) is not side:
            there = world.berths[side.berth]
            if there is None:
                self._open_target(side)
                yield "go"
                self._rebuild(side)
                yield "go"
            elif there.state == "held":
                side.server = there
                world.open_dock(side, udp=True)
        if side.server is not None:
            if side.server in world.berths.values():
                side.server.state = "held"
            yield "go"
            if side.server not in world.berths.values():
                raise StepError("server_gone")
            side.udp = False
            side.server.adopt(request.id, "moved")
        self._say(run, ev.Resumed(id=request.id, at_ms=0, took_ms=1, queued=0))
        try:
            yield "go"
        finally:
            world.close(side)
            world.images.pop(request.id, None)
            world.begun.discard(request.id)
            self.sides.pop(request.id, None)

    def _restore_abort(self, run: Run, request: ev.Requested) -> Step:
        world = self.world
        side = self.sides.get(request.id) or Side(request, request.target.berth)
        yield "go"
        if side.criu:
            self._kill(side.server)
        if request.id in world.begun:
            self._kill(world.berths[side.berth])
        world.close(side)
        world.images.pop(request.id, None)
        world.begun.discard(request.id)
        self.sides.pop(request.id, None)
        self._say(run, ev.TargetCleared(id=request.id, at_ms=0))

    def _prepared(self, request: ev.Requested) -> Side:
        side = self.sides.get(request.id)
        if side is None or not side.ready:
            raise StepError("internal")
        return side

    def _kill(self, server: Server | None) -> None:
        for name, there in self.world.berths.items():
            if server is not None and there is server:
                self.world.berths[name] = None


@dataclass(eq=False)
class Task:
    """A command on its way: services/coordinator/driver.py."""

    state: State
    command: Command
    told: bool = False


class Coordinator:
    """Follows the log at its own pace and carries out what the state machine asks for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.start()

    def start(self) -> None:
        """Replay in silence, then everything outstanding."""
        self.alive = True
        self.read = 0
        self.states: dict[str, State] = {}
        self.last: dict[str, int] = {}
        self.tasks: list[Task] = []
        self.timers: dict[str, StartTimer] = {}
        self.catch_up()
        self.tasks.clear()
        self.timers.clear()
        for state in self.states.values():
            if state.outcome is None:
                for command in outstanding(state):
                    self._give(state, command)

    def catch_up(self) -> None:
        while self.read < len(self.world.log.entries):
            self._take()

    def die(self) -> None:
        self.alive = False
        self.tasks.clear()
        self.timers.clear()

    def wanted(self, task: Task) -> bool:
        return task.command in outstanding(self.states[task.state.request.id])

    def _take(self) -> None:
        event = self.world.log.entries[self.read]
        self.read += 1
        state, commands = handle(self.states.get(event.id), event)
        self.states[event.id] = state
        if isinstance(event, ev.Decision):
            self.last[event.id] = self.read
        for command in commands:
            self._give(state, command)

    def _give(self, state: State, command: Command) -> None:
        match command:
            case StartTimer():
                self.timers[state.request.id] = command
            case StopTimer():
                self.timers.pop(state.request.id, None)
            case _:
                self.tasks.append(Task(state, command))

    def actions(self) -> list[Callable[[], None]]:
        if not self.alive:
            return []
        found: list[Callable[[], None]] = [lambda task=task: self.carry_out(task) for task in self.tasks]  # type: ignore[misc]
        if self.read < len(self.world.log.entries):
            found.append(self._take)
        return found

    def carry_out(self, task: Task) -> None:
        """It works, or whoever is asked says no."""
        world, request = self.world, task.state.request
        self.tasks.remove(task)
        if isinstance(task.command, CallAgent | ArmServer | Decide) and not self.wanted(task):
            return
        match task.command:
            case CallAgent() | ArmServer():
                try:
                    self.ask(task)
                except StepError as error:
                    self.call_failed(task, str(error))
            case Decide():
                try:
                    world.log.decide(decision(request.id, task.command), self.last.get(request.id, 0))
                except StepError:  # another decision was first: once it is read here, this one may be wanted still
                    self.tasks.append(task)
            case Place():
                world.placed = max(world.placed, request.epoch)
            case Unlock():
                if world.lock == request.id:
                    world.lock = ""

    def ask(self, task: Task) -> None:
        """Raises StepError when nobody takes it."""
        request, command = task.state.request, task.command
        if ENDS & set(self.world.log.decisions(request.id)):
            # A limit of the whole: a coordinator that wakes up long after another one has finished, and finds an
            # agent that was restarted since, would open what nobody closes.
            raise StepError("too_late")
        if isinstance(command, CallAgent):
            self.world.agents[command.agent].accept(request, command.verb, command.attempt, command.round)
        elif isinstance(command, ArmServer):
            servers = [s for s in self.world.berths.values() if s is not None and s.state == "running"]
            if not servers:
                raise StepError("server_unarmed")
            if command.disarm:
                servers[0].disarm(request.id)
                self.world.log.append(ev.Disarmed(id=request.id, at_ms=0))
            else:
                servers[0].arm(request.id)
                self.world.log.append(ev.Armed(id=request.id, at_ms=0, clients=1))

    def call_failed(self, task: Task, code: str) -> None:
        """driver._insist, after its limit."""
        command = task.command
        assert isinstance(command, CallAgent | ArmServer)
        if not self.wanted(task):
            return
        attempt = command.attempt if isinstance(command, CallAgent) else 1
        if not task.told:
            error = ErrorBody(code=code, message="It was not taken.")
            event = ev.CallFailed(id=task.state.request.id, at_ms=0, to=command.name, attempt=attempt, error=error)
            self.world.log.append(event)
        unheard = code in ("no_answer", "server_unarmed")
        if unheard and isinstance(command, CallAgent) and task.state.phase in PERSISTENT:
            self.tasks.append(changed(task, told=True))

    def fire(self, migration: str) -> None:
        timer = self.timers.pop(migration)
        if timer in outstanding(self.states[migration]):
            self.world.log.append(ev.TimedOut(id=migration, at_ms=0, phase=timer.phase, attempt=timer.attempt))

    def request(self, migration: str, **options: int) -> bool:
        """services/coordinator/intake.py; whether the migration is in the log."""
        world = self.world
        if not self.alive or self.read < len(world.log.entries):
            return False
        holder = self.states.get(world.lock)
        if world.lock and (holder is None or holder.outcome is None):
            return False
        there = [name for name, server in world.berths.items() if server is not None]
        if len(there) != 1:
            return False
        world.lock = migration
        epoch = max([world.placed, *(s.request.epoch for s in self.states.values() if s.committed)])
        target = "b" if there == ["a"] else "a"
        requested = ev.Requested(
            id=migration,
            at_ms=0,
            service="echo",
            source=BERTHS[there[0]],
            target=BERTHS[target],
            epoch=epoch + 1,
            options=Options(**options),
        )
        world.log.decide(requested, 0)
        return True


def decision(migration: str, command: Decide) -> ev.Decision:
    base: dict[str, Any] = {"id": migration, "at_ms": 0}
    match command.decision:
        case "prepared":
            return ev.Prepared(**base)
        case "committed":
            return ev.Committed(**base)
        case "completed":
            return ev.Completed(**base, arrived=command.arrived)
        case "rolled_back":
            assert command.reason
            return ev.RolledBack(**base, reason=command.reason)
        case "failed":
            assert command.reason
            return ev.Failed(**base, reason=command.reason)
