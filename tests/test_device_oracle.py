"""Random programs on 1 to 16 devices: traces prove that order, sets and capacity were kept."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

import charioteer as ch
from charioteer import cpu, gpu, virtual

MEMORY = 64 << 20


@dataclass
class Plan:
    width: int
    """How many devices; 0 is a task on a core."""
    cores: int
    """How many cores beside them."""
    share: float
    memory: int
    after: list[int]
    pause: int
    twist: str
    attempts: int = field(default=0, compare=False)


@dataclass
class Program:
    gpus: int
    workers: int
    runahead: int
    time: str
    plans: list[Plan]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    gpus = draw(st.integers(1, 16))
    time = draw(st.sampled_from(["real", "real", "real", "virtual"]))
    count = draw(st.integers(1, 30))
    plans = [
        Plan(
            width=draw(st.integers(0, min(gpus, 4)) | st.integers(0, gpus)),
            cores=draw(st.sampled_from([0, 0, 0, 1, 2, 4])),
            share=draw(st.sampled_from([1.0, 1.0, 0.5, 0.3, 0.0])),
            memory=draw(st.sampled_from([0, 0, MEMORY // 4, MEMORY // 3])),
            after=draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) if i else [],
            pause=draw(st.integers(0, 3)),
            twist=draw(
                st.sampled_from(
                    ["none"] * 12
                    + ["raises", "retried", "bad work", "cancelled", "awaits", "waits"]
                    + ["computes", "loses"]
                )
            ),
        )
        for i in range(count)
    ]
    return Program(
        gpus=gpus,
        workers=0 if time == "virtual" else draw(st.sampled_from([0, 1, 4])),
        runahead=draw(st.sampled_from([0, 64])),
        time=time,
        plans=plans,
    )


def run(program: Program, path: Path) -> None:
    machine = ch.Machine.virtual(program.gpus, memory=MEMORY, time=program.time)
    runtime = ch.Runtime(
        machine,
        workers=program.workers,
        runahead=program.runahead,
        trace=path,
        on_failure=lambda _: None,
    )
    with runtime:
        tasks: list[ch.Task[Any]] = []
        for plan in program.plans:
            placement: Any = cpu
            if plan.width:
                # What is on no device takes neither of them.
                needs: dict[str, Any] = {"share": plan.share}
                if plan.memory:
                    needs["memory"] = plan.memory
                cores = min(plan.cores, max(1, program.workers))
                devices: Any = (gpu * plan.width, cpu * cores) if cores else gpu * plan.width
                placement = ch.Requirement(devices, **needs)

            def work(plan: Plan = plan) -> None:
                context = ch.current()
                for device in context.each() if context.streams else ():
                    if device.kind == cpu:
                        continue
                    context.stream.busy(plan.pause * 5e-5)
                    if plan.twist == "computes":
                        virtual.ones(8).sum()
                    if plan.twist == "bad work":
                        context.stream.enqueue(lambda: 1 / 0)
                if plan.twist == "loses" and context.streams and runtime._devices is not None:
                    runtime._devices.lose(context.device.index, "on purpose")
                plan.attempts += 1
                if plan.twist == "raises" or (plan.twist == "retried" and plan.attempts == 1):
                    raise RuntimeError("on purpose")

            async def waits(plan: Plan = plan, work: Any = work) -> None:
                work()
                await ch.spawn(placement=gpu)(lambda: None)
                work()

            def blocks(plan: Plan = plan, work: Any = work) -> None:
                work()
                with contextlib.suppress(ch.CancelledError, ch.DependencyError, ch.DeviceError):
                    ch.spawn(placement=gpu)(lambda: None).result()
                work()

            bodies: dict[str, Any] = {"awaits": waits, "waits": blocks}
            body: Any = bodies.get(plan.twist, work)
            task = ch.spawn(
                placement=placement,
                dependencies=[tasks[i] for i in plan.after],
                retries=1 if plan.twist == "retried" else 0,
            )(body)
            if plan.twist == "cancelled":
                task.cancel()
            tasks.append(task)
        for task in tasks:
            with contextlib.suppress(ch.CancelledError, ch.DependencyError):
                task.exception(timeout=60)


@settings(max_examples=60, deadline=None)
@given(program=programs())
def test_random_programs_keep_every_promise(program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace"
        run(program, path)
        checked = ch.check_trace(path)
    assert checked.violations == ()
    assert checked.tasks >= len(program.plans)
