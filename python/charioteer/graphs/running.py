"""Runs of a graph on the runtime, and the proof that each was right.

**Kernels.** A task keeps its set busy for as long as its graph says: a core spins in C, a part of
the time under the GIL, in slices; a virtual GPU has pauses on its stream, and the part under the
GIL is spun by the body between them. What a kernel takes beyond what is asked of it is found out
before the run and taken off (:class:`Calibration`). In virtual time all is a pause on the stream,
to the nanosecond. There work on cores takes no time, so that graphs with cores are refused.

**Movement** of the blocks that tasks read and write:

- *none*: blocks are not there. Tasks pass a word on, each from what those before it left.
- *lazy*: whoever reads a block brings a copy to its place when it runs, if it is elsewhere. A write
  makes a new version, on the first device of the writer's set, so that readers of the old one are
  not disturbed. A version is dropped when its last reader is complete.
- *eager*: blocks are managed arrays, tasks declare what they access, and the runtime has it there
  before they begin. Every block begins on the host, and a task has cores or one GPU: a set would
  have to say how it shares what it writes.

**Proof.** Each task notes where it ran and when it began and ended, on a device by operations of
its streams. After the run it is seen that every task ran once; on a set that its graph allows;
after the end of all that it depends on; that nothing had more of a device at once than there is;
and that the data is what one task after the other would have made. A task sums up all elements of
what it reads, in an order that counts, and fills what it writes with the outcome; so one stale
element anywhere changes all that depends on it. What fails is a :class:`VerificationError`.

**Order.** The longer the chain behind a task, the larger its priority. In virtual time bodies take
no time, so that they would run ahead of the devices without end, and tasks would be given devices
in the order in which they become ready; with ``runahead=0`` a device is given to whom is first when
it is free, which is what an offline list schedule does. Nothing begins there before all is spawned:
without workers a body runs as soon as it may, so that devices would go to those that are spawned
first, though no time has passed when the more urgent ones behind them are there too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import Any, Literal

import numpy as np

import charioteer as ch
from charioteer import _core
from charioteer.graphs.analysis import Site, possible, ranks
from charioteer.graphs.description import Graph, GraphError, Need, Task

__all__ = ["Calibration", "Movement", "Ran", "Run", "VerificationError", "calibrate", "run"]

Movement = Literal["none", "lazy", "eager"]
SECOND = 1e9
"""Clocks count nanoseconds."""


class VerificationError(Exception):
    """A run was not what its graph says.

    Attributes:
        problems: all that was found, in words.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        super().__init__("; ".join(problems[:3]) + more)
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Calibration:
    """Seconds that a kernel takes beyond what is asked of it, on a core and on a GPU."""

    core: float = 0.0
    gpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Ran:
    """Where and when a task ran, in nanoseconds of the run's clock.

    Attributes:
        places: its devices, in their order.
        spans: when it began and ended on each of them.
    """

    places: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def start(self) -> int:
        """When it began."""
        return min((start for start, _ in self.spans), default=0)

    @property
    def end(self) -> int:
        """When it ended."""
        return max((end for _, end in self.spans), default=0)


@dataclass(frozen=True)
class Run:
    """A run that was right.

    Attributes:
        seconds: from the first spawn until all are complete, on the machine's clock.
        ran: for each task where and when.
    """

    seconds: float
    ran: tuple[Ran, ...]


# ---- words and blocks ---------------------------------------------------------------------------
#
# Arithmetic modulo 2**64 with odd factors, by which nothing is lost.

WORD = np.dtype(np.uint64)
MASK = (1 << 64) - 1
FACTOR = 0x9E3779B97F4A7C15
SALT = 0xD1B54A32D192ED03


def _salt(index: int) -> int:
    return (index + 1) * SALT & MASK


def _mixed(index: int, words: Sequence[int]) -> int:
    """What a task makes of what it reads."""
    made = _salt(index)
    for word in words:
        made = (made * FACTOR + word) & MASK
    return made


def _length(size: int) -> int:
    """Words of a block."""
    return -(-size // WORD.itemsize)


def expected(graph: Graph, movement: Movement) -> list[int]:
    """The word of each task, or of each block where data is moved, one task after the other."""
    if movement == "none":
        words: list[int] = []
        for index, task in enumerate(graph):
            words.append(_mixed(index, [words[before] for before in task.after]))
        return words
    blocks = [_salt(index) for index in range(len(graph.blocks))]
    lengths = [_length(block.size) for block in graph.blocks]
    for index, task in enumerate(graph):
        sums = [blocks[at] * lengths[at] & MASK for at in (*task.reads, *task.updates)]
        made = _mixed(index, sums)
        for at in task.writes:
            blocks[at] = made
        for at in task.updates:
            blocks[at] = (blocks[at] * FACTOR + made) & MASK
    return blocks


# ---- kernels ------------------------------------------------------------------------------------


def calibrate(machine: ch.Machine, rounds: int = 15) -> Calibration:
    """Measure what kernels take beyond what is asked, on this machine's kinds of devices.

    It takes some milliseconds. In virtual time there is nothing to measure.
    """
    if machine.time == "virtual":
        return Calibration()
    asked = 200e-6
    beyond = []
    for _ in range(rounds):
        start = perf_counter_ns()
        _core.work(asked)
        beyond.append((perf_counter_ns() - start) / SECOND - asked)
    core = max(0.0, median(beyond))
    if not machine.gpus:
        return Calibration(core)
    marks: list[int] = []
    with machine.open() as devices:
        stream = devices.stream(0)
        for _ in range(rounds):
            stream.enqueue(lambda: marks.append(perf_counter_ns()))
            stream.busy(asked)
            stream.enqueue(lambda: marks.append(perf_counter_ns()))
            stream.synchronize()
    pairs = zip(marks[::2], marks[1::2], strict=True)
    return Calibration(core, max(0.0, median((b - a) / SECOND - asked for a, b in pairs)))


class _Log:
    """What the tasks of a run note. A task's own entry is its own; only its first and last
    operation write it, from whatever thread."""

    def __init__(self, tasks: int, now: Callable[[], int]) -> None:
        self.now = now
        self.bodies = [0] * tasks
        self.places: list[tuple[str, ...]] = [()] * tasks
        # Of each task when it began and ended on each device; the numbers of marks are seen to be
        # right.
        self.starts: list[dict[str, int]] = [{} for _ in range(tasks)]
        self.ends: list[dict[str, int]] = [{} for _ in range(tasks)]
        self.words: list[int | None] = [None] * tasks


@dataclass(slots=True)
class _Version:
    """A version of a block: where it is, and how many have yet to read it."""

    array: Any
    place: str
    left: int


class _Store:
    """The versions of blocks that are still to be read. Movement is lazy."""

    def __init__(self, graph: Graph) -> None:
        self._lock = threading.Lock()
        self._versions: dict[tuple[int, int], _Version] = {}
        # Which version of a block a task reads is known beforehand: the last one written before it.
        self.reads: list[tuple[tuple[int, int], ...]] = []
        self.writes: list[tuple[tuple[int, int], ...]] = []
        self.readers: dict[tuple[int, int], int] = {}
        self.writers: dict[tuple[int, int], int] = {}
        current = [0] * len(graph.blocks)
        for index, task in enumerate(graph):
            seen = tuple((block, current[block]) for block in (*task.reads, *task.updates))
            self.reads.append(seen)
            for key in seen:
                self.readers[key] = self.readers.get(key, 0) + 1
            made = []
            for block in (*task.writes, *task.updates):
                current[block] += 1
                made.append((block, current[block]))
                self.writers[block, current[block]] = index
            self.writes.append(tuple(made))
        self.last = [(block, version) for block, version in enumerate(current)]
        for key in self.last:
            # Who looks at the end is a reader too.
            self.readers[key] = self.readers.get(key, 0) + 1

    def put(self, key: tuple[int, int], array: Any, place: str) -> None:
        readers = self.readers.get(key, 0)
        if readers:
            with self._lock:
                self._versions[key] = _Version(array, place, readers)

    def get(self, key: tuple[int, int]) -> _Version:
        with self._lock:
            return self._versions[key]

    def done(self, keys: Sequence[tuple[int, int]]) -> None:
        """A reader of these is complete."""
        gone = []
        with self._lock:
            for key in keys:
                version = self._versions[key]
                version.left -= 1
                if not version.left:
                    gone.append(self._versions.pop(key))
        # Arrays go outside of the lock.
        gone.clear()


class _Runner:
    """A run in the making."""

    def __init__(
        self,
        graph: Graph,
        needs: Sequence[Sequence[Need]],
        movement: Movement,
        runtime: ch.Runtime,
        calibration: Calibration,
    ) -> None:
        devices = runtime.devices
        self.graph = graph
        self.needs = needs
        self.movement = movement
        self.calibration = calibration
        clock = devices.clock if devices is not None else None
        self.virtual_time = runtime.machine.time == "virtual"
        self.log = _Log(
            len(graph),
            (lambda: clock.now) if self.virtual_time and clock is not None else perf_counter_ns,
        )
        self.store = _Store(graph) if movement == "lazy" else None
        self.arrays: list[ch.Array] = []
        self.functions: dict[object, ch.TaskFunction[[int], None]] = {}

    # -- spawning --

    def spawn(self) -> list[ch.Task[Any]]:
        """Spawn all tasks; those that bring blocks to their homes come first."""
        rank = ranks(self.graph)
        order = {seconds: at for at, seconds in enumerate(sorted(set(rank)))}
        tasks: list[ch.Task[Any]] = []
        homes: dict[int, ch.Task[Any]] = {}
        if self.movement == "eager":
            for index, block in enumerate(self.graph.blocks):
                self.arrays.append(ch.full(_length(block.size), _salt(index), WORD))
        for at, (size, home) in enumerate((b.size, b.home) for b in self.graph.blocks):
            if self.store is None:
                break
            if home == "cpu":
                self.store.put((at, 0), np.full(_length(size), _salt(at), WORD), home)
            else:
                homes[at] = self._bring(at, size, home)
        start = ch.TaskSpace("start")[0] if self.virtual_time else None
        for index, task in enumerate(self.graph):
            before = [tasks[at] for at in task.after]
            if start is not None and not before:
                before.append(start)
            if self.store is not None:
                for key in self.store.reads[index]:
                    if key in self.store.writers:
                        before.append(tasks[self.store.writers[key]])
                    elif key[0] in homes:
                        before.append(homes[key[0]])
            options: dict[str, Any] = {"dependencies": before, "priority": order[rank[index]]}
            needs = self.needs[index]
            if self.movement == "eager":
                for mode, used in (
                    ("input", task.reads),
                    ("output", task.writes),
                    ("inout", task.updates),
                ):
                    if used:
                        options[mode] = [self.arrays[block] for block in used]
            if len(needs) > 1:
                # What run times are told apart by: tasks of one function differ.
                options["size"] = 1 + round(SECOND * needs[0].seconds)
            options["placement"] = [_requirement(need) for need in needs]
            tasks.append(self._function(task, needs).options(task.title, **options)(index))
        if start is not None:
            ch.spawn(start)(lambda: None)
        return tasks

    def _bring(self, block: int, size: int, home: str) -> ch.Task[Any]:
        store = self.store
        assert store is not None

        @ch.spawn(placement=_member(home))
        def bring() -> None:
            array = ch.current().xp.full(_length(size), np.uint64(_salt(block)), WORD)
            store.put((block, 0), array, home)

        return bring

    def _function(self, task: Task, needs: Sequence[Need]) -> ch.TaskFunction[[int], None]:
        """The task function of a kind and of these sets; one that is chosen among has a body a
        set."""
        key = (task.kind, *(need.places for need in needs))
        function = self.functions.get(key)
        if function is not None:
            return function
        body = self._body

        def named(index: int) -> None:
            body(index)

        named.__name__ = named.__qualname__ = task.kind
        function = ch.task(named, base=len(needs) == 1)
        if len(needs) > 1:
            for at, need in enumerate(needs):
                function.variant(_set(need), cost=partial(self._cost, at))(named)
        self.functions[key] = function
        return function

    def _cost(self, at: int, index: int) -> float:
        return self.needs[index][at].seconds

    # -- running --

    def _body(self, index: int) -> None:
        context = ch.current()
        log = self.log
        log.bodies[index] += 1
        places = tuple(map(_place, context.devices))
        log.places[index] = places
        need = _chosen(self.needs[index], places)
        if need is None:
            return  # It is told after the run.
        if need.gpus:
            self._on_devices(index, need, context)
        else:
            self._mark(log.starts, index, places)
            self._read_on_host(index)
            self._spin(need, need.seconds)
            self._write_on_host(index)
            self._mark(log.ends, index, places)

    def _mark(self, marks: list[dict[str, int]], index: int, places: Sequence[str]) -> None:
        now = self.log.now()
        for place in places:
            if place in marks[index]:
                raise AssertionError(f"a second mark of task {index} on {place}")
            marks[index][place] = now

    def _spin(self, need: Need, seconds: float) -> None:
        rest = max(0.0, seconds - self.calibration.core)
        if need.held == 0 and need.slices > 1:
            for _ in range(need.slices):
                _core.work(rest / need.slices)
        else:
            _core.work(rest, need.held, need.slices)

    def _on_devices(self, index: int, need: Need, context: ch.Context) -> None:
        log = self.log
        cores = [_place(device) for device in context.devices if device.kind == ch.cpu]
        self._mark(log.starts, index, cores)
        streams: list[Any] = []
        for device in context.each():
            if device.kind == ch.cpu:
                continue
            stream = context.stream
            stream.enqueue(partial(self._mark, log.starts, index, (_place(device),)))
            if not streams:
                self._read_on_device(index, context, stream)
            streams.append(stream)
        held = 0.0 if self.virtual_time or cores else need.held
        pause = max(0.0, need.seconds * (1 - held) / need.slices - self.calibration.gpu)
        for _ in range(need.slices):
            for stream in streams:
                stream.busy(pause)
            if held:
                _core.work(need.seconds * held / need.slices, 1.0)
        if cores:
            # They work meanwhile.
            self._spin(need, need.seconds)
        self._written_on_device(index, streams[0])
        for device in context.each():
            if device.kind == ch.cpu:
                continue
            context.stream.enqueue(partial(self._mark, log.ends, index, (_place(device),)))
        self._mark(log.ends, index, cores)

    # -- what passes through --

    def _pass_on(self, index: int) -> None:
        """Without data: make a word of those that the tasks before left."""
        words = self.log.words
        before = [words[at] for at in self.graph.tasks[index].after]
        words[index] = _mixed(index, [-1 if word is None else word for word in before])

    def _read_on_host(self, index: int) -> None:
        if self.movement == "none":
            self._pass_on(index)

    def _write_on_host(self, index: int) -> None:
        if self.movement == "none":
            return
        task = self.graph.tasks[index]
        if self.store is None:
            here = {b: ch.current().local(self.arrays[b]) for b in _used(task)}
            sums = [_sum(here[block]) for block in (*task.reads, *task.updates)]
            made = np.uint64(_mixed(index, sums))
            for block in task.writes:
                here[block][...] = made
            for block in task.updates:
                here[block] *= np.uint64(FACTOR)
                here[block] += made
            return
        arrays = {}
        for key in self.store.reads[index]:
            array = self.store.get(key).array
            arrays[key[0]] = array if isinstance(array, np.ndarray) else array.get()
        made = np.uint64(
            _mixed(index, [_sum(arrays[block]) for block in (*task.reads, *task.updates)])
        )
        for key in self.store.writes[index]:
            block = key[0]
            if block in task.updates:
                array = arrays[block] * np.uint64(FACTOR) + made
            else:
                array = np.full(_length(self.graph.blocks[block].size), made, WORD)
            self.store.put(key, array, "cpu")
        self.store.done(self.store.reads[index])

    def _read_on_device(self, index: int, context: ch.Context, stream: Any) -> None:
        if self.movement == "none":
            stream.enqueue(lambda: self._pass_on(index))
            return
        xp = context.xp
        made = xp.full(1, np.uint64(_salt(index)), WORD)
        task = self.graph.tasks[index]
        store = self.store
        if store is None:
            here = {block: context.local(self.arrays[block]) for block in _used(task)}
            for block in (*task.reads, *task.updates):
                made = made * np.uint64(FACTOR) + here[block].sum(keepdims=True)
            for block in task.writes:
                here[block][...] = made
            for block in task.updates:
                here[block] *= np.uint64(FACTOR)
                here[block] += made
            return
        place = _place(context.device)
        arrays = {}
        for key in store.reads[index]:
            version = store.get(key)
            array = version.array
            if version.place == "cpu":
                array = xp.asarray(array)
            elif version.place != place:
                array = xp.empty(array.shape, WORD)
                xp.copyto(array, version.array)
            arrays[key[0]] = array
            made = made * np.uint64(FACTOR) + array.sum(keepdims=True)
        for key in store.writes[index]:
            block = key[0]
            if block in task.updates:
                array = arrays[block] * np.uint64(FACTOR) + made
            else:
                array = xp.empty(_length(self.graph.blocks[block].size), WORD)
                array[...] = made
            store.put(key, array, place)

    def _written_on_device(self, index: int, stream: Any) -> None:
        store = self.store
        if store is not None and store.reads[index]:
            stream.enqueue(lambda: store.done(store.reads[index]))

    # -- proof --

    def problems(self, finals: Sequence[Any]) -> list[str]:
        """All that was not as the graph says."""
        found: list[str] = []
        log = self.log
        ran = self.ran()
        for index, task in enumerate(self.graph):
            if log.bodies[index] != 1:
                found.append(f"task {task.title} ran {log.bodies[index]} times")
                continue
            need = _chosen(self.needs[index], log.places[index])
            if need is None:
                found.append(f"task {task.title} ran on {', '.join(log.places[index])}")
                continue
            marks = set(log.places[index])
            if set(log.starts[index]) != marks or set(log.ends[index]) != marks:
                found.append(f"task {task.title} did not end on all of its devices")
                continue
            for before in task.after:
                if log.ends[before] and ran[index].start < ran[before].end:
                    other = self.graph.tasks[before].title
                    found.append(f"task {task.title} began before the end of task {other}")
        found += self._exceeded(ran)
        right = expected(self.graph, self.movement)
        if self.movement == "none":
            for index, task in enumerate(self.graph):
                if log.words[index] != right[index]:
                    found.append(f"task {task.title} has a wrong word")
        else:
            for block, array in enumerate(finals):
                if not (array == np.uint64(right[block])).all():
                    found.append(f"block {block} has wrong data")
        return found

    def ran(self) -> tuple[Ran, ...]:
        """Where and when each task ran, as far as it did."""
        log = self.log
        return tuple(
            Ran(
                log.places[index],
                tuple(
                    (log.starts[index].get(place, 0), log.ends[index].get(place, 0))
                    for place in log.places[index]
                ),
            )
            for index in range(len(self.graph))
        )

    def _exceeded(self, ran: Sequence[Ran]) -> list[str]:
        """Devices of which tasks had more at once than there is."""
        changes: dict[str, list[tuple[int, int, float]]] = {}
        for index, one in enumerate(ran):
            need = _chosen(self.needs[index], one.places)
            if need is None or not self.log.ends[index]:
                continue
            for place, (start, end) in zip(one.places, one.spans, strict=True):
                part = 1.0 if place.startswith("cpu") else need.share
                events = changes.setdefault(place, [])
                # Who ends goes before who begins in the same moment, and who takes no time is
                # nowhere.
                if end > start:
                    events += [(start, 1, part), (end, 0, -part)]
        found = []
        for place, events in changes.items():
            taken = most = 0.0
            for _, _, part in sorted(events):
                taken += part
                most = max(most, taken)
            if most > 1 + 1e-6:
                found.append(f"{place} was taken {most:.3g} times at once")
        return found


def _used(task: Task) -> tuple[int, ...]:
    return (*task.reads, *task.writes, *task.updates)


def _sum(array: np.ndarray[Any, Any]) -> int:
    return int(array.sum(dtype=WORD))


def _place(device: ch.Device) -> str:
    """The name of a device: ``cpu(2)``, ``gpu(0)``."""
    return repr(device)


def _chosen(needs: Sequence[Need], places: Sequence[str]) -> Need | None:
    """Which alternative a set of devices is; nothing if it is none."""
    for need in needs:
        if len(need.places) == len(places) and all(
            have == want or have.startswith(f"{want}(")
            for want, have in zip(need.places, places, strict=True)
        ):
            return need
    return None


def _member(place: str) -> Any:
    if place == "cpu":
        return ch.cpu
    return ch.gpu if place == "gpu" else ch.gpu(int(place[4:-1]))


def _set(need: Need) -> Any:
    members = tuple(map(_member, need.places))
    return members[0] if len(members) == 1 else members


def _requirement(need: Need) -> Any:
    if not need.gpus:
        return _set(need)
    return ch.Requirement(_set(need), memory=need.memory or None, share=need.share)


def run(
    graph: Graph,
    *,
    machine: ch.Machine | None = None,
    workers: int | None = None,
    movement: Movement = "none",
    runahead: int | None = None,
    calibration: Calibration | None = None,
) -> Run:
    """Run a graph in a runtime of its own, and see that it was right.

    Args:
        graph: what.
        machine: on what; the default of :class:`charioteer.Runtime` unless said.
        workers: on how many cores; likewise. In virtual time there are none.
        movement: what becomes of the blocks; see the module.
        runahead: as in :class:`charioteer.Runtime`; its default unless said, and 0 in virtual time.
        calibration: what kernels take beyond what is asked; measured unless said.

    Raises:
        GraphError: a task fits nowhere on the machine, or cannot run there in this way.
        VerificationError: the run was not what the graph says.
        RuntimeActiveError: a runtime is open.
    """
    runtime = ch.Runtime(machine, workers)
    here, cores = runtime.machine, runtime.workers
    needs = possible(graph, Site.of(here, max(1, cores)))
    _refuse(graph, needs, here, movement)
    if runahead is None:
        runahead = 0 if here.time == "virtual" else 64
    # With the machine opened by itself: what is measured is no part of the run.
    measured = calibrate(here) if calibration is None else calibration
    with ch.Runtime(here, cores, runahead) as runtime:
        runner = _Runner(graph, needs, movement, runtime, measured)
        begin = runner.log.now()
        tasks = runner.spawn()
        ch.wait(tasks)
        seconds = (runner.log.now() - begin) / SECOND
        for task in tasks:
            error = task.exception()
            if error is not None:
                raise error
        finals: list[Any] = []
        if runner.store is not None:
            finals = [_fetched(runner.store.get(key)) for key in runner.store.last]
        elif movement == "eager":
            finals = [array.numpy() for array in runner.arrays]
    problems = runner.problems(finals)
    if problems:
        raise VerificationError(problems)
    return Run(seconds, runner.ran())


def _fetched(version: _Version) -> np.ndarray[Any, Any]:
    array = version.array
    return array if isinstance(array, np.ndarray) else array.get()


def _refuse(
    graph: Graph, needs: Sequence[Sequence[Need]], machine: ch.Machine, movement: Movement
) -> None:
    """Refuse what cannot be run in this way.

    Raises:
        GraphError: it cannot.
    """
    for task, some in zip(graph, needs, strict=True):
        if machine.time == "virtual" and any(need.cores for need in some):
            raise GraphError(f"task {task.title}: in virtual time work on cores takes no time")
        if any(need.gpus for need in some):
            if machine.driver != "virtual":
                raise GraphError(f"task {task.title}: graphs run on cores and virtual GPUs")
            if movement == "eager" and any(need.gpus and len(need.places) > 1 for need in some):
                raise GraphError(f"task {task.title}: with eager movement a task has one GPU")
