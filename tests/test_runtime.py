"""How does a runtime open, serve, close, and meet signals, forks and the interpreter's end?"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support import (
    Boom,
    Gate,
    Latch,
    Script,
    anything,
    boom,
    eventually,
    leaves,
    no_op,
    run_script,
    threads_of_process,
    worker_counts,
)

import charioteer as ch

# Opening and closing


def test_workers_are_as_asked() -> None:
    for workers in (0, 1, 3):
        with ch.Runtime(workers=workers) as rt:
            assert rt.workers == workers


def test_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHARIOTEER_WORKERS", raising=False)
    with ch.Runtime() as rt:
        assert 1 <= rt.workers <= len(os.sched_getaffinity(0))


def test_workers_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARIOTEER_WORKERS", "3")
    with ch.Runtime() as rt:
        assert rt.workers == 3
    with ch.Runtime(workers=1) as rt:
        assert rt.workers == 1


@pytest.mark.parametrize("value", ["many", "-1", "1.5", "99999999999999999999"])
def test_bad_workers_of_the_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CHARIOTEER_WORKERS", value)
    with pytest.raises(ValueError, match="CHARIOTEER_WORKERS"):
        with ch.Runtime():
            pass
    with ch.Runtime(workers=1) as rt:
        assert rt.submit(lambda: 1).result() == 1


@pytest.mark.parametrize(
    "keywords",
    [
        {"workers": -1},
        {"workers": "2"},
        {"workers": 1.5},
        {"workers": 2**70},
        {"max_pending": 0},
        {"max_pending": -1},
        {"max_pending": "many"},
        {"overtaking": -1},
        {"overtaking": 2**64},
        {"overtaking": 1.5},
        {"unknown": 1},
        {"trace": 3},
    ],
)
def test_bad_arguments(keywords: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        with ch.Runtime(**keywords):
            pass
    with ch.Runtime(workers=1) as rt:
        assert rt.submit(lambda: 1).result() == 1


def test_leaving_the_block_waits_for_every_task() -> None:
    ran: list[int] = []
    with ch.Runtime(workers=2) as rt:
        tasks = [rt.submit(lambda i=i: (time.sleep(0.001), ran.append(i))) for i in range(50)]
    assert sorted(ran) == list(range(50))
    assert all(task.done() for task in tasks)


def test_close_is_what_leaving_does_and_may_be_repeated() -> None:
    ran: list[int] = []
    with ch.Runtime(workers=2) as rt:
        for i in range(20):
            rt.submit(ran.append, i)
        rt.close()
        assert sorted(ran) == list(range(20))
        with pytest.raises(ch.NoRuntimeError):
            rt.submit(no_op)
        rt.close()
        rt.close(cancel=True)


def test_close_raises_what_nobody_received() -> None:
    with ch.Runtime(workers=2) as rt:
        rt.submit(boom, "unread")
        with pytest.raises(ExceptionGroup) as info:
            rt.close()
    assert [type(error) for error in leaves(info.value)] == [Boom]


def test_close_from_another_thread() -> None:
    with ch.Runtime(workers=2) as rt:
        task = rt.submit(lambda: 1)
        thread = threading.Thread(target=rt.close)
        thread.start()
        thread.join()
        assert task.result() == 1
        with pytest.raises(ch.NoRuntimeError):
            ch.spawn(no_op)


def test_close_on_a_thread_that_it_would_wait_for_is_refused() -> None:
    heard: list[BaseException] = []

    with ch.Runtime(workers=1) as rt:

        def close(_: object = None) -> None:
            try:
                rt.close()
            except RuntimeError as error:
                heard.append(error)

        async def on_the_loop() -> None:
            await asyncio.sleep(0)
            close()

        gate = threading.Event()
        rt.submit(gate.wait).add_done_callback(close)  # called by the worker
        gate.set()
        rt.submit(close)
        rt.submit(on_the_loop)
    assert len(heard) == 3
    assert all("cannot close" in str(error) for error in heard)


def test_close_from_many_threads_at_once() -> None:
    with ch.Runtime(workers=2) as rt:
        gate = Gate()
        gate.started.wait()
        threads = [threading.Thread(target=rt.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        gate.open()
        for thread in threads:
            thread.join()
    assert gate.task.done()


def test_after_closing() -> None:
    with ch.Runtime(workers=2) as rt:
        good, bad = rt.submit(lambda: "kept"), rt.submit(boom, "kept")
        assert isinstance(bad.exception(), Boom)
    assert good.result() == "kept"
    assert good.result(timeout=0) == "kept"
    assert isinstance(bad.exception(), Boom)
    assert ch.wait([good, bad]).done == {good, bad}
    seen: list[Any] = []
    good.add_done_callback(seen.append)
    assert seen == [good]
    assert good.future().result(timeout=0) == "kept"
    for call in (
        lambda: rt.submit(no_op),
        lambda: list(rt.map(no_op, [1])),
        lambda: ch.spawn(no_op),
        lambda: ch.spawn_many(no_op, [1]),
        lambda: ch.task(no_op)(),
    ):
        with pytest.raises(ch.NoRuntimeError):
            anything(call)()


def test_another_runtime_after_the_first() -> None:
    for i in range(20):
        with ch.Runtime(workers=i % 4) as rt:
            assert rt.submit(lambda i=i: i).result() == i


def test_handles_serve_in_the_next_runtime() -> None:
    latch = Latch()
    with pytest.raises(LookupError):
        with ch.Runtime(workers=2) as rt:
            good, bad = rt.submit(lambda: 1), rt.submit(boom)
            cancelled = ch.spawn(dependencies=[latch.task])(no_op)
            ch.wait([good, bad])
            raise LookupError
    with ch.Runtime(workers=2) as rt:
        assert rt.submit(lambda x: x + 1, good).result() == 2
        assert isinstance(rt.submit(lambda x: x, bad).exception(), ch.DependencyError)
        assert isinstance(rt.submit(lambda x: x, cancelled).exception(), ch.DependencyError)


def test_a_second_runtime_is_refused(rt: ch.Runtime) -> None:
    with pytest.raises(ch.RuntimeActiveError) as info:
        with ch.Runtime(workers=1):
            pass
    assert isinstance(info.value, RuntimeError)
    assert rt.submit(lambda: "unharmed").result() == "unharmed"
    refused: list[BaseException] = []

    def elsewhere() -> None:
        try:
            with ch.Runtime(workers=1):
                pass
        except BaseException as error:
            refused.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert isinstance(refused[0], ch.RuntimeActiveError)


def test_opening_from_many_threads_has_one_winner() -> None:
    meeting = threading.Barrier(4)
    opened: list[int] = []
    refused: list[int] = []
    tried = threading.Barrier(4)

    def opener(k: int) -> None:
        meeting.wait()
        try:
            with ch.Runtime(workers=1):
                opened.append(k)
                tried.wait()
        except ch.RuntimeActiveError:
            refused.append(k)
            tried.wait()

    threads = [threading.Thread(target=opener, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(opened), len(refused)) == (1, 3)


def test_spawning_races_with_closing() -> None:
    for _ in range(20):
        accepted: list[Any] = []
        ran: list[int] = []
        refused = threading.Event()

        def spawner() -> None:
            while True:
                try:
                    accepted.append(ch.spawn(lambda: ran.append(1)))
                except ch.NoRuntimeError:
                    refused.set()
                    return

        with ch.Runtime(workers=2):
            thread = threading.Thread(target=spawner)
            thread.start()
            eventually(lambda: len(accepted) > 20, "the spawner spawns")
        thread.join()
        assert refused.is_set()
        assert all(task.done() for task in accepted)
        assert len(ran) == len(accepted)


def test_opened_and_closed_by_hand() -> None:
    rt = ch.Runtime(workers=1)
    rt.__enter__()
    assert rt.submit(lambda: 1).result() == 1
    rt.__exit__(None, None, None)
    with pytest.raises(ch.NoRuntimeError):
        rt.submit(no_op)


def test_many_workers() -> None:
    with ch.Runtime(workers=64) as rt:
        meeting = threading.Barrier(64)
        tasks = ch.spawn_many(lambda _: meeting.wait(30), range(64))
        assert sorted(tasks.result()) == list(range(64))
        assert rt.workers == 64


def test_repr() -> None:
    with ch.Runtime(workers=2) as rt:
        assert "Runtime" in repr(rt)
    assert "Runtime" in repr(rt)


# Inline


def test_inline_bodies_run_at_the_spawn_in_the_calling_thread() -> None:
    with ch.Runtime(workers=0):
        where: list[int] = []
        task = ch.spawn(lambda: where.append(threading.get_ident()))
        assert where == [threading.get_ident()]
        assert task.done()


def test_inline_order_is_deterministic() -> None:
    def program() -> list[str]:
        log: list[str] = []
        with ch.Runtime(workers=0):
            space = ch.TaskSpace("T")
            for i in range(20):
                dependencies = [space[(i * 7) % 20]] if (i * 7) % 20 < i else []
                ch.spawn(space[i], dependencies=dependencies)(lambda i=i: log.append(f"{i}"))
            with Latch() as latch:
                for i in range(20):
                    ch.spawn(dependencies=[latch])(lambda i=i: log.append(f"latched {i}"))

            def outer() -> None:
                log.append("outer")
                ch.spawn(lambda: log.append("inner")).result()
                log.append("outer again")

            ch.spawn(outer)
        return log

    first = program()
    assert len(first) == 43
    assert all(program() == first for _ in range(3))


def test_inline_has_no_worker_threads() -> None:
    before = set(threads_of_process())
    with ch.Runtime(workers=0):
        ch.spawn_many(lambda x: x, range(100)).result()
        assert set(threads_of_process()) <= before


def test_inline_deep_spawning_and_chains(tmp_path: Path) -> None:
    done = run_script(
        """
        ran = []
        def body(n):
            ran.append(n)
            if n:
                ch.spawn(lambda: body(n - 1))
        try:
            with ch.Runtime(workers=0) as rt:
                rt.submit(body, 20000)
            say("ran", len(ran))
        except BaseExceptionGroup as group:
            say("named", *[type(error).__name__ for error in group.exceptions])
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() in (["ran", "20001"], ["named", "RecursionError"])


def test_inline_debuggers_see_the_callers_frames() -> None:
    with ch.Runtime(workers=0):
        frames: list[str] = []

        @ch.spawn
        def body() -> None:
            frame = sys._getframe()
            while frame is not None:
                frames.append(frame.f_code.co_name)
                frame = anything(frame.f_back)

        assert body.result() is None
    assert "test_inline_debuggers_see_the_callers_frames" in frames


# max_pending


def test_max_pending_makes_the_spawner_wait() -> None:
    accepted: list[Any] = []

    def spawner() -> None:
        for _ in range(20):
            accepted.append(ch.spawn(no_op))

    with ch.Runtime(workers=1, max_pending=4):
        gate = Gate()
        gate.started.wait()
        thread = threading.Thread(target=spawner)
        thread.start()
        eventually(lambda: len(accepted) >= 3, "three more are accepted")
        time.sleep(0.1)
        assert len(accepted) == 3
        gate.open()
        thread.join()
    assert len(accepted) == 20
    assert all(task.done() for task in accepted)


def test_max_pending_counts_what_is_unfinished() -> None:
    unfinished, most, lock = [0], [0], threading.Lock()

    def body() -> None:
        with lock:
            unfinished[0] -= 1

    with ch.Runtime(workers=2, max_pending=5):
        for _ in range(500):
            with lock:
                unfinished[0] += 1
                most[0] = max(most[0], unfinished[0])
            ch.spawn(body)
    # The one about to be spawned and those of bodies on their way out come on top.
    assert most[0] <= 5 + 1 + 2


def test_max_pending_in_bodies_is_no_deadlock() -> None:
    ran: list[int] = []
    for limit in (1, 2, 5):
        with ch.Runtime(workers=1, max_pending=limit):

            @ch.task
            def outer() -> None:
                for i in range(20):
                    ch.spawn(lambda i=i: ran.append(i))

            outer()
            outer()
    assert len(ran) == 3 * 2 * 20


def test_max_pending_in_callbacks_is_no_deadlock() -> None:
    ran: list[int] = []
    with ch.Runtime(workers=1, max_pending=2) as rt:
        for _ in range(10):
            rt.submit(no_op).add_done_callback(
                lambda _: [rt.submit(ran.append, 1) for _ in range(5)]
            )
    assert len(ran) == 50


def test_max_pending_in_on_failure_is_no_deadlock() -> None:
    ran: list[int] = []

    def heard(task: Any) -> None:
        for _ in range(5):
            ch.spawn(lambda: ran.append(1))

    with ch.Runtime(workers=1, max_pending=2, on_failure=heard) as rt:
        for _ in range(5):
            rt.submit(boom)
        eventually(lambda: len(ran) == 25, "all that on_failure spawned has run")


def test_max_pending_on_the_loops_thread_is_no_deadlock() -> None:
    ran: list[int] = []

    async def body() -> None:
        await asyncio.sleep(0)
        for i in range(20):
            ch.spawn(lambda i=i: ran.append(i))
        await asyncio.sleep(0)

    with ch.Runtime(workers=1, max_pending=2) as rt:
        rt.submit(body)
        rt.submit(body)
    assert len(ran) == 40


def test_max_pending_with_spawn_many_and_map() -> None:
    with ch.Runtime(workers=2, max_pending=3) as rt:
        assert ch.spawn_many(lambda x: x, range(100)).result() == list(range(100))
        assert list(rt.map(lambda x: x, range(100))) == list(range(100))


def test_max_pending_inline() -> None:
    with ch.Runtime(workers=0, max_pending=1):
        assert ch.spawn_many(lambda x: x, range(10)).result() == list(range(10))


def test_max_pending_and_a_failure_to_make_room() -> None:
    # The spawner waits for room that only a cancelled task gives.
    with ch.Runtime(workers=1, max_pending=2):
        gate = Gate()
        gate.started.wait()
        pending = ch.spawn(no_op)
        threading.Timer(0.05, pending.cancel).start()
        assert ch.spawn(lambda: "found room") is not None
        gate.open()


# Threads


def test_worker_threads_have_names(rt2: ch.Runtime) -> None:
    meeting = threading.Barrier(2)

    def body() -> str:
        meeting.wait(30)
        return threading.current_thread().name

    names = {task.result() for task in [rt2.submit(body), rt2.submit(body)]}
    assert len(names) == 2
    assert all(name.lower().startswith("charioteer") for name in names)


def body_to_trace() -> int:
    total = 0
    for i in range(3):
        total += i
    return total


@pytest.mark.parametrize("workers", worker_counts(1, 2))
def test_worker_threads_honour_settrace(workers: int) -> None:
    events: set[tuple[str, str]] = set()

    def tracer(frame: Any, event: str, _: Any) -> Any:
        events.add((frame.f_code.co_name, event))
        return tracer

    before = threading.gettrace()
    threading.settrace(tracer)
    try:
        with ch.Runtime(workers=workers) as rt:
            started = threading.Event()
            rt.submit(lambda: (body_to_trace(), started.set()))
            started.wait()
    finally:
        threading.settrace(anything(before))
    assert {("body_to_trace", "call"), ("body_to_trace", "line")} <= events


@pytest.mark.parametrize("workers", worker_counts(1, 2))
def test_worker_threads_honour_setprofile(workers: int) -> None:
    events: set[tuple[str, str]] = set()

    def profiler(frame: Any, event: str, _: Any) -> None:
        events.add((frame.f_code.co_name, event))

    before = threading.getprofile()
    threading.setprofile(profiler)
    try:
        with ch.Runtime(workers=workers) as rt:
            started = threading.Event()
            rt.submit(lambda: (body_to_trace(), started.set()))
            started.wait()
    finally:
        threading.setprofile(anything(before))
    assert {("body_to_trace", "call"), ("body_to_trace", "return")} <= events


def test_thread_locals_and_dummy_threads(rt: ch.Runtime) -> None:
    local = threading.local()

    def body(i: int) -> Any:
        local.value = i
        return local.value, threading.current_thread() in threading.enumerate()

    tasks = [rt.submit(body, i) for i in range(50)]
    assert [task.result() for task in tasks] == [(i, True) for i in range(50)]


# current()


def test_current_knows_the_task(rt_any: ch.Runtime) -> None:
    space = ch.TaskSpace("T")

    @ch.spawn(space[4])
    def body() -> Any:
        return ch.current().task

    assert body.result() == space[4]
    anonymous = rt_any.submit(lambda: ch.current().task)
    assert anonymous.result() == anonymous


def test_current_lives_no_longer_than_the_body(rt: ch.Runtime) -> None:
    context = rt.submit(ch.current).result()
    assert context.task.name
    with pytest.raises(RuntimeError):
        ch.current()


# Statistics and traces


def test_stats(rt: ch.Runtime) -> None:
    before = rt.stats()
    ch.spawn_many(lambda x: x, range(100)).result()
    after = rt.stats()
    assert isinstance(before, dict) and before
    assert set(before) <= set(after)
    assert after != before


def test_stats_after_closing() -> None:
    with ch.Runtime(workers=1) as rt:
        rt.submit(no_op).result()
    assert isinstance(rt.stats(), dict)


def test_trace_file(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with ch.Runtime(workers=2, trace=path) as rt:
        ch.spawn_many(lambda x: x, range(100)).result()
        assert isinstance(rt.submit(boom).exception(), Boom)
    assert path.stat().st_size > 100
    other = tmp_path / "other"
    with ch.Runtime(workers=1, trace=str(other)):
        pass
    assert other.exists()
    assert other.read_bytes()[:4] == path.read_bytes()[:4]


def test_a_trace_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        with ch.Runtime(workers=1, trace=tmp_path / "missing" / "trace"):
            pass
    with ch.Runtime(workers=1) as rt:
        assert rt.submit(lambda: 1).result() == 1


# Signals


def test_interrupt_in_a_wait(tmp_path: Path) -> None:
    with Script(
        """
        events = []
        gate, assigned = ch.TaskSpace("gate"), threading.Event()
        def listens():
            assigned.wait()
            say("ready")
            while not ch.current().cancel_requested:
                time.sleep(0.005)
            events.append("asked")
        try:
            with ch.Runtime(workers=2) as rt:
                pending = ch.spawn(dependencies=[gate[0]])(lambda: events.append("ran"))
                running = rt.submit(listens)
                assigned.set()
                running.result()
        except KeyboardInterrupt:
            events.append("interrupted")
        say(*events, pending.cancelled(), running.done())
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-1] == "asked interrupted True True"


def test_interrupt_while_leaving_the_block(tmp_path: Path) -> None:
    with Script(
        """
        events = []
        gate = ch.TaskSpace("gate")
        def listens():
            while not ch.current().cancel_requested:
                time.sleep(0.005)
            events.append("asked")
        try:
            with ch.Runtime(workers=2) as rt:
                running = rt.submit(listens)
                pending = ch.spawn(dependencies=[running, gate[0]])(lambda: None)
                def late():
                    time.sleep(0.2)
                    say("ready")
                threading.Thread(target=late).start()
        except KeyboardInterrupt:
            events.append("interrupted")
        say(*events, pending.cancelled(), running.done())
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-1] == "asked interrupted True True"


@pytest.mark.parametrize(
    "wait",
    [
        "task.result()",
        "ch.wait([task])",
        "list(ch.as_completed([task]))",
        "ch.gather(task).result()",
        "task.exception(timeout=3600)",
        "list(rt.map(listens, [1]))",
    ],
)
def test_interrupt_in_every_wait(tmp_path: Path, wait: str) -> None:
    with Script(
        f"""
        assigned = threading.Event()
        def listens(*_):
            assigned.wait()
            time.sleep(0.1)
            say("ready")
            while not ch.current().cancel_requested:
                time.sleep(0.005)
        try:
            with ch.Runtime(workers=2) as rt:
                task = rt.submit(listens)
                assigned.set()
                try:
                    {wait}
                except KeyboardInterrupt:
                    say("in the wait")
                    raise
        except KeyboardInterrupt:
            say("interrupted")
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        time.sleep(0.05)
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-2:] == ["in the wait", "interrupted"]


def test_interrupt_while_bodies_compute(tmp_path: Path) -> None:
    # Two bodies hold the GIL in turn; the main thread must still get its signal.
    with Script(
        """
        def computes():
            say("ready")
            while not ch.current().cancel_requested:
                sum(range(1000))
        try:
            with ch.Runtime(workers=2) as rt:
                tasks = [rt.submit(computes) for _ in range(2)]
                tasks[0].result()
        except KeyboardInterrupt:
            say("interrupted")
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-1] == "interrupted"


def test_interrupt_while_the_spawner_waits_for_room(tmp_path: Path) -> None:
    with Script(
        """
        def listens():
            say("ready")
            while not ch.current().cancel_requested:
                time.sleep(0.005)
        try:
            with ch.Runtime(workers=1, max_pending=2) as rt:
                for _ in range(10):
                    rt.submit(listens)
        except KeyboardInterrupt:
            say("interrupted")
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        time.sleep(0.1)
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-1] == "interrupted"


def test_second_interrupt_stops_waiting(tmp_path: Path) -> None:
    with Script(
        """
        def deaf():
            say("ready")
            while True:
                time.sleep(0.05)
        def heard():
            while not ch.current().cancel_requested:
                time.sleep(0.005)
            say("asked")
        try:
            with ch.Runtime(workers=2) as rt:
                rt.submit(heard)
                rt.submit(deaf).result()
        except KeyboardInterrupt:
            say("interrupted")
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        time.sleep(0.05)
        script.interrupt()
        script.wait_for("asked")
        time.sleep(0.1)
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-1] == "interrupted"


def test_an_uncaught_interrupt_ends_the_process(tmp_path: Path) -> None:
    with Script(
        """
        with ch.Runtime(workers=2) as rt:
            def listens():
                say("ready")
                while not ch.current().cancel_requested:
                    time.sleep(0.005)
            rt.submit(listens).result()
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        script.interrupt()
        status, _, error = script.finish()
    assert status not in (0, 1)
    assert "KeyboardInterrupt" in error


def test_interrupt_under_asyncio(tmp_path: Path) -> None:
    with Script(
        """
        import asyncio
        def listens():
            say("ready")
            while not ch.current().cancel_requested:
                time.sleep(0.005)
            say("asked")
        async def main():
            async with ch.Runtime(workers=2) as rt:
                await rt.submit(listens)
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            say("interrupted")
        """,
        tmp_path,
    ) as script:
        script.wait_for("ready")
        time.sleep(0.05)
        script.interrupt()
        status, lines, error = script.finish()
    assert status == 0, error
    assert lines[-2:] == ["asked", "interrupted"]


def test_other_signal_handlers_run_during_waits(tmp_path: Path) -> None:
    done = run_script(
        """
        seen = []
        signal.signal(signal.SIGALRM, lambda *_: seen.append("alarm"))
        with ch.Runtime(workers=1) as rt:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            def body():
                while not seen:
                    time.sleep(0.005)
                return "ended"
            say(rt.submit(body).result(), *seen)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["ended", "alarm"]


def test_a_handler_that_raises_ends_the_wait(tmp_path: Path) -> None:
    done = run_script(
        """
        class Alarm(Exception): pass
        def handler(*_):
            raise Alarm
        signal.signal(signal.SIGALRM, handler)
        release = threading.Event()
        with ch.Runtime(workers=1) as rt:
            task = rt.submit(release.wait)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            try:
                task.result()
            except Alarm:
                say("alarm", task.done())
            release.set()
            say(task.result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["alarm", "False", "True"]


# Forks and the end of the interpreter


def test_fork_with_a_live_runtime(tmp_path: Path) -> None:
    done = run_script(
        """
        import warnings
        warnings.simplefilter("ignore")
        space = ch.TaskSpace("T")
        with ch.Runtime(workers=2) as rt:
            finished = rt.submit(lambda: "finished")
            finished.result()
            pending = ch.spawn(dependencies=[space[0]])(lambda: "pending")
            child = os.fork()
            if child == 0:
                for name, use in {
                    "submit": lambda: rt.submit(lambda: 1),
                    "spawn": lambda: ch.spawn(lambda: 1),
                    "map": lambda: list(rt.map(abs, [1])),
                    "result": lambda: pending.result(),
                    "wait": lambda: ch.wait([pending]),
                    "executor": lambda: rt.executor().submit(abs, 1).result(),
                }.items():
                    try:
                        use()
                    except RuntimeError as error:
                        say(name, "fork" in str(error).lower())
                say("finished", finished.result() == "finished")
                try:
                    rt.close()
                except RuntimeError:
                    pass
                os._exit(7)
            _, status = os.waitpid(child, 0)
            say("status", os.waitstatus_to_exitcode(status))
            ch.spawn(space[0])(lambda: None)
            say("parent", pending.result(), rt.submit(lambda: "works").result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [
        "submit True",
        "spawn True",
        "map True",
        "result True",
        "wait True",
        "executor True",
        "finished True",
        "status 7",
        "parent pending works",
    ]


def test_a_forked_child_that_leaves_the_block(tmp_path: Path) -> None:
    done = run_script(
        """
        import warnings
        warnings.simplefilter("ignore")
        child = None
        try:
            with ch.Runtime(workers=2) as rt:
                rt.submit(lambda: 1).result()
                child = os.fork()
        except RuntimeError as error:
            say("told" if child == 0 else "parent failed", type(error).__name__)
        if child == 0:
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say("status", os.waitstatus_to_exitcode(status))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "status 0"
    assert "parent failed" not in done.stdout


def test_a_forked_child_that_exits_as_usual(tmp_path: Path) -> None:
    done = run_script(
        """
        import warnings
        warnings.simplefilter("ignore")
        rt = ch.Runtime(workers=2).__enter__()
        rt.submit(lambda: 1).result()
        # Its thread does not come along, and the child would wait for it at its end.
        faulthandler.cancel_dump_traceback_later()
        child = os.fork()
        if child == 0:
            sys.exit(5)
        _, status = os.waitpid(child, 0)
        rt.close()
        say("status", os.waitstatus_to_exitcode(status))
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["status", "5"]


def test_fork_without_a_runtime_and_a_runtime_in_the_child(tmp_path: Path) -> None:
    done = run_script(
        """
        import warnings
        warnings.simplefilter("ignore")
        with ch.Runtime(workers=2) as rt:
            rt.submit(lambda: 1).result()
        child = os.fork()
        with ch.Runtime(workers=2) as rt:
            value = rt.submit(lambda: 21).result() * 2
        if child == 0:
            os._exit(value)
        _, status = os.waitpid(child, 0)
        say("status", os.waitstatus_to_exitcode(status), value)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["status", "42", "42"]


def test_multiprocessing_beside_a_runtime(tmp_path: Path) -> None:
    done = run_script(
        """
        import multiprocessing, warnings
        warnings.simplefilter("ignore")
        if __name__ == "__main__":
            with ch.Runtime(workers=2) as rt:
                task = rt.submit(lambda: 1)
                for method in ("fork", "spawn"):
                    context = multiprocessing.get_context(method)
                    process = context.Process(target=abs, args=(1,))
                    process.start()
                    process.join()
                    say(method, process.exitcode, task.result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["fork 0 1", "spawn 0 1"]


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(0.2)",
        "time.sleep(3600)",
        "[time.sleep(0.01) for _ in iter(int, 1)]",
        "[sum(range(1000)) for _ in iter(int, 1)]",
        "ch.spawn(lambda: time.sleep(3600)).result()",
    ],
)
def test_the_interpreter_ends_with_a_live_runtime(tmp_path: Path, body: str) -> None:
    done = run_script(
        f"""
        rt = ch.Runtime(workers=2).__enter__()
        started = threading.Event()
        space = ch.TaskSpace("T")
        rt.submit(lambda: (started.set(), {body}))
        pending = ch.spawn(dependencies=[space[0]])(lambda: None)
        started.wait()
        say("main ends")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "main ends"
    assert "Fatal" not in done.stderr


def test_the_interpreter_ends_with_a_sleeping_async_task(tmp_path: Path) -> None:
    done = run_script(
        """
        import asyncio
        rt = ch.Runtime(workers=2).__enter__()
        started = threading.Event()
        async def body():
            await asyncio.sleep(0)
            started.set()
            await asyncio.sleep(3600)
        task = rt.submit(body)
        started.wait()
        say("main ends")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "main ends"


def test_the_interpreter_ends_after_an_exception_with_a_live_runtime(tmp_path: Path) -> None:
    done = run_script(
        """
        rt = ch.Runtime(workers=2).__enter__()
        rt.submit(time.sleep, 0.1)
        raise LookupError("of the script")
        """,
        tmp_path,
    )
    assert done.returncode == 1
    assert "of the script" in done.stderr
    assert "Fatal" not in done.stderr


def test_the_interpreter_ends_with_handles_and_spaces_alive(tmp_path: Path) -> None:
    done = run_script(
        """
        space = ch.TaskSpace("T")
        with ch.Runtime(workers=2) as rt:
            kept = [rt.submit(lambda i=i: [i]) for i in range(1000)]
            for i in range(1000):
                ch.spawn(space[i])(lambda i=i: kept[i])
        cycle = [kept, space, rt]
        cycle.append(cycle)
        function = ch.task(lambda: cycle)
        say("main ends")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "main ends"
    assert done.stderr == ""


def test_spawning_in_an_exit_handler(tmp_path: Path) -> None:
    done = run_script(
        """
        import atexit
        rt = ch.Runtime(workers=2).__enter__()
        def late():
            try:
                say("late", rt.submit(lambda: 1).result(timeout=5))
            except RuntimeError as error:
                say("late", type(error).__name__)
        atexit.register(late)
        say("main ends")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[1] in ("late 1", "late NoRuntimeError")


def test_a_daemon_thread_that_spawns_while_the_interpreter_ends(tmp_path: Path) -> None:
    done = run_script(
        """
        rt = ch.Runtime(workers=2).__enter__()
        def spawner():
            try:
                while True:
                    ch.spawn(lambda: None)
                    time.sleep(0.0001)
            except ch.NoRuntimeError:
                pass
        threading.Thread(target=spawner, daemon=True).start()
        time.sleep(0.05)
        say("main ends")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "Fatal" not in done.stderr


def test_runtime_of_a_subinterpreters_import_is_refused_or_works(tmp_path: Path) -> None:
    done = run_script(
        """
        try:
            import _xxsubinterpreters as interpreters
        except ImportError:
            say("none")
            sys.exit()
        with ch.Runtime(workers=1) as rt:
            rt.submit(lambda: 1).result()
            sub = interpreters.create()
            try:
                interpreters.run_string(sub, "import charioteer")
            except Exception:
                pass
            say(rt.submit(lambda: "alive").result())
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() in (["alive"], ["none"])


def test_import_starts_no_thread(tmp_path: Path) -> None:
    done = run_script(
        """
        names = [open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")]
        say(sum("chario" in name for name in names), len(threading.enumerate()))
        """,
        tmp_path,
    )
    assert done.stdout.split() == ["0", "1"]
