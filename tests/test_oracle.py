"""Random programs against a sequential oracle.

A program is a list of steps in an order of ranks: a step needs, awaits or spawns only steps of
other ranks such that the whole can end. The oracle walks the ranks once and says what becomes of
each step: its value, its failure, the roots that a skipped step may name, or its cancellation.
The runtime gets the steps in a random order, from several threads, some from inside other
bodies, and must agree: one outcome each, every attempt counted, no body before the end of what
it needs, and at exit exactly the roots that nobody received.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import assume, given, note
from hypothesis import strategies as st
from support import anything, leaves, no_op, worker_counts

import charioteer as ch


class Planned(Exception):
    """The failure of a step, by its rank."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"step {rank} fails as planned")
        self.rank = rank


@dataclass(frozen=True)
class Step:
    """What one task does."""

    arguments: tuple[int, ...]
    named: tuple[int, ...]
    waits: tuple[int, ...]
    failures: int
    retries: int
    cancelled: bool
    is_async: bool
    sleeps: bool
    priority: int
    children: int
    parent: int | None

    @property
    def needs(self) -> set[int]:
        return set(self.arguments) | set(self.named)


@dataclass(frozen=True)
class Outcome:
    """What becomes of a step: a value, or the roots that its failure may go back to."""

    kind: str
    value: int = 0
    roots: frozenset[int | str] = frozenset()
    attempts: int = 0


@dataclass(frozen=True)
class Program:
    """Steps by rank, the order of their spawns, and where they are spawned."""

    steps: tuple[Step, ...]
    order: tuple[int, ...]
    spawners: int
    gated: bool
    workers: int
    read: frozenset[int]
    outcomes: tuple[Outcome, ...] = field(compare=False)


def predict(step: Step, rank: int, outcomes: list[Outcome]) -> Outcome:
    """The oracle: what becomes of a step, given what became of those before it."""
    if step.cancelled:
        return Outcome("cancelled", roots=frozenset({"cancelled"}))
    roots = frozenset[int | str]().union(*(outcomes[need].roots for need in step.needs))
    if roots:
        return Outcome("skipped", roots=roots)
    if step.failures > step.retries:
        return Outcome("failed", roots=frozenset({rank}), attempts=step.retries + 1)
    value = (
        rank
        + sum(outcomes[a].value for a in step.arguments)
        + sum(outcomes[w].value for w in step.waits)
        + sum(range(step.children))
    ) % 10_007
    return Outcome("value", value=value, attempts=step.failures + 1)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    count = draw(st.integers(1, 14))
    workers = draw(st.sampled_from(worker_counts(0, 1, 2, 4)))
    gated = draw(st.booleans())
    waiting = draw(st.booleans())
    hosting = draw(st.booleans())
    if workers == 0 and waiting:
        # One thread cannot wait for what it is itself to spawn later.
        gated, hosting = True, False
    steps: list[Step] = []
    outcomes: list[Outcome] = []
    # Steps that end after a body that waits on its stack: their own, or that of one that they need.
    blocking: set[int] = set()

    def some(rank: int, most: int) -> tuple[int, ...]:
        if rank == 0:
            return ()
        return tuple(draw(st.lists(st.integers(0, rank - 1), max_size=most)))

    for rank in range(count):
        hosts = [p for p in range(rank) if outcomes[p].kind == "value"]
        parent = draw(st.sampled_from([None, None, *hosts])) if hosting else None
        troubled = draw(st.integers(0, 3)) == 0
        waits = some(rank, 2) if waiting else ()
        if workers == 0:
            # What runs on top of a body that waits must not wait for that one.
            waits = tuple(wait for wait in waits if wait not in blocking)
        step = Step(
            arguments=some(rank, 2),
            named=some(rank, 3),
            waits=waits,
            failures=draw(st.integers(0, 3)) if troubled else 0,
            retries=draw(st.integers(0, 2)),
            cancelled=gated and parent is None and draw(st.integers(0, 5)) == 0,
            is_async=draw(st.booleans()),
            sleeps=draw(st.integers(0, 4)) == 0,
            priority=draw(st.integers(-3, 3)),
            children=draw(st.sampled_from([0, 0, 0, 1, 3])),
            parent=parent,
        )
        if (waits and not step.is_async) or blocking & {*step.needs, *waits}:
            blocking.add(rank)
        steps.append(step)
        outcomes.append(predict(step, rank, outcomes))
    roots = [rank for rank in range(count) if steps[rank].parent is None]
    return Program(
        steps=tuple(steps),
        order=tuple(draw(st.permutations(roots))),
        spawners=draw(st.integers(1, 3)),
        gated=gated,
        workers=workers,
        read=frozenset(draw(st.sets(st.integers(0, count - 1)))),
        outcomes=tuple(outcomes),
    )


class Run:
    """One execution of a program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.space = ch.TaskSpace("step")
        self.gate = ch.TaskSpace("gate")
        self.log: list[tuple[str, int]] = []
        self.attempts: Counter[int] = Counter()
        self.told: set[int | str] = set()
        self.tell_lock = threading.Lock()

    def hear(self, error: BaseException) -> None:
        """Note whom a failure that was received goes back to."""
        root = error.__cause__ if isinstance(error, ch.DependencyError) else error
        with self.tell_lock:
            self.told.add(root.rank if isinstance(root, Planned) else "cancelled")

    def spawn(self, rank: int) -> None:
        step = self.program.steps[rank]
        body = self.async_body(rank) if step.is_async else self.body(rank)
        named: list[Any] = [self.space[need] for need in step.named]
        if self.program.gated:
            named.append(self.gate[0])
        function = ch.task(**self.options(step))(body)
        function.options(self.space[rank], dependencies=named)(
            *[self.space[need] for need in step.arguments]
        )

    @staticmethod
    def options(step: Step) -> dict[str, Any]:
        return {"priority": step.priority, "retries": step.retries}

    def enter(self, rank: int) -> int:
        self.attempts[rank] += 1
        self.log.append(("start", rank))
        return self.attempts[rank]

    def leave(self, rank: int, attempt: int, arguments: tuple[int, ...], more: int) -> int:
        """Spawn what the last attempt spawns, and end as the step says."""
        step = self.program.steps[rank]
        self.log.append(("end", rank))
        if attempt <= step.failures:
            raise Planned(rank)
        return (rank + sum(arguments) + more) % 10_007

    def host(self, rank: int, attempt: int) -> None:
        step = self.program.steps[rank]
        if attempt > step.failures:
            for other, its in enumerate(self.program.steps):
                if its.parent == rank:
                    self.spawn(other)

    def body(self, rank: int) -> Any:
        step = self.program.steps[rank]

        def run(*arguments: int) -> int:
            attempt = self.enter(rank)
            self.host(rank, attempt)
            more = 0
            for other in step.waits:
                try:
                    more += self.space[other].result()
                except (Planned, ch.DependencyError, ch.CancelledError) as error:
                    self.hear(error)
            if step.sleeps:
                threading.Event().wait(0.0005)
            children = [ch.spawn(lambda i=i: i) for i in range(step.children)]
            more += sum(child.result() for child in children)
            return self.leave(rank, attempt, arguments, more)

        return run

    def async_body(self, rank: int) -> Any:
        step = self.program.steps[rank]

        async def run(*arguments: int) -> int:
            attempt = self.enter(rank)
            self.host(rank, attempt)
            more = 0
            for other in step.waits:
                try:
                    more += await self.space[other]
                except (
                    Planned,
                    ch.DependencyError,
                    ch.CancelledError,
                    asyncio.CancelledError,
                ) as error:
                    self.hear(error)
            if step.sleeps:
                await asyncio.sleep(0)
            children = [ch.spawn(lambda i=i: i) for i in range(step.children)]
            more += sum(await ch.gather(*children))
            return self.leave(rank, attempt, arguments, more)

        return run

    def spawn_all(self) -> None:
        order, spawners = self.program.order, self.program.spawners
        failures: list[BaseException] = []

        def spawner(k: int) -> None:
            try:
                for rank in order[k::spawners]:
                    self.spawn(rank)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=spawner, args=(k,)) for k in range(1, spawners)]
        for thread in threads:
            thread.start()
        spawner(0)
        for thread in threads:
            thread.join()
        assert failures == []
        if self.program.gated:
            # From the last to the first: who cancels the first also ends what needs it.
            for rank in reversed(range(len(self.program.steps))):
                if self.program.steps[rank].cancelled:
                    assert self.space[rank].cancel() is True
            ch.spawn(self.gate[0])(no_op)

    def check_outcome(self, rank: int) -> None:
        task, expected = self.space[rank], self.program.outcomes[rank]
        assert task.done()
        if expected.kind == "cancelled":
            assert task.cancelled()
            return
        assert not task.cancelled()
        error = task.exception()
        if error is not None:
            self.hear(error)
        match expected.kind:
            case "value":
                assert error is None, (rank, error)
                assert task.result() == expected.value
            case "failed":
                assert isinstance(error, Planned) and error.rank == rank
            case "skipped":
                assert isinstance(error, ch.DependencyError), (rank, error)
                cause = error.__cause__
                root = cause.rank if isinstance(cause, Planned) else "cancelled"
                assert root == "cancelled" or isinstance(cause, Planned)
                assert root in expected.roots

    def check_order(self) -> None:
        running: set[int] = set()
        ended: set[int] = set()
        attempts: Counter[int] = Counter()
        for event, rank in self.log:
            if event == "start":
                assert rank not in running, f"two attempts of {rank} at once"
                running.add(rank)
                attempts[rank] += 1
                assert self.program.steps[rank].needs <= ended, f"{rank} started too soon"
            else:
                running.remove(rank)
                if attempts[rank] == self.program.outcomes[rank].attempts:
                    ended.add(rank)
        expected = {r: o.attempts for r, o in enumerate(self.program.outcomes) if o.attempts}
        assert dict(attempts) == expected


@given(programs())
def test_random_programs(program: Program) -> None:
    note(f"{program}")
    run = Run(program)
    received: list[BaseException] = []
    try:
        with ch.Runtime(workers=program.workers):
            run.spawn_all()
            tasks = [run.space[rank] for rank in range(len(program.steps))]
            not_done = ch.wait(tasks, timeout=50).not_done
            assert not not_done, f"never done: {not_done}"
            for rank in program.read:
                run.check_outcome(rank)
            told = set(run.told)
    except ExceptionGroup as group:
        received = leaves(group)
    roots = {rank for rank, outcome in enumerate(program.outcomes) if outcome.kind == "failed"}
    assert sorted(anything(error).rank for error in received) == sorted(roots - told)
    for rank in range(len(program.steps)):
        run.check_outcome(rank)
    run.check_order()


def any_waits(program: Program) -> bool:
    return any(step.waits for step in program.steps)


@given(programs())
def test_inline_programs_repeat_exactly(program: Program) -> None:
    assume(program.spawners == 1 and (program.workers == 0 or not any_waits(program)))

    def log() -> list[tuple[str, int]]:
        run = Run(program)
        try:
            with ch.Runtime(workers=0):
                run.spawn_all()
        except ExceptionGroup:
            pass
        return run.log

    assert log() == log()


trees = st.recursive(st.integers(-5, 5), lambda inner: st.lists(inner, max_size=4), max_leaves=30)


def total(tree: Any) -> int:
    """The sum of a tree's leaves, one after the other."""
    return tree if isinstance(tree, int) else sum(total(branch) for branch in tree)


@given(trees, st.sampled_from(worker_counts(0, 1, 2, 4)), st.randoms(use_true_random=False))
def test_random_trees_of_waits(tree: Any, workers: int, chooser: Any) -> None:
    seed = chooser.random()

    def ways(branch: Any, depth: int) -> int:
        return int((seed * 1000 + len(str(branch)) + depth) % 4)

    def blocking(branch: Any, depth: int) -> Any:
        if isinstance(branch, int):
            return branch
        children = [spawn(inner, depth + 1) for inner in branch]
        match ways(branch, depth):
            case 0:
                return sum(child.result() for child in children)
            case 1:
                return sum(task.result() for task in ch.as_completed(children))
            case 2:
                return sum(ch.gather(*children).result())
            case _:
                return ch.spawn(lambda values=children: sum(values)).result()

    async def awaiting(branch: Any, depth: int) -> int:
        if isinstance(branch, int):
            return branch
        children = [spawn(inner, depth + 1) for inner in branch]
        if ways(branch, depth) % 2:
            await asyncio.sleep(0)
            return sum(await ch.gather(*children))
        return sum([await child for child in children])

    def spawn(branch: Any, depth: int) -> Any:
        body: Any = awaiting if ways(branch, depth + 7) == 0 else blocking
        return ch.task(priority=-depth)(body)(branch, depth)

    with ch.Runtime(workers=workers):
        assert spawn(tree, 0).result() == total(tree)
