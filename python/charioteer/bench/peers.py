"""The other runtimes: how each runs many empty tasks.

Every peer does what a user of it would write for "call this many small functions": one task a
call, all submitted, then all awaited. Those that take closures get a new closure a task, which
captures the loop variable; Ray, which pickles its functions once, gets the value as an argument.

Peers that run in this process are called directly. Ray and ``distributed`` bring schedulers and
processes of their own, so they run in a process that starts and ends with the run
(:mod:`charioteer.bench.probes`) and cannot disturb the runs beside it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, sleep
from typing import Any

from charioteer.bench.harness import Missing

__all__ = [
    "MULTI_DEVICE",
    "PEERS",
    "RAY_ACTORS",
    "RAY_COMPILED",
    "RAY_RESOURCES",
    "SETTLING",
    "THREAD_POOL",
    "Peer",
    "load",
    "started_ray",
]

THREAD_POOL = "ThreadPoolExecutor"
RAY_ACTORS = "Ray, an actor a device"
RAY_COMPILED = "Ray, compiled graphs of actors"
RAY_RESOURCES = "Ray, a custom resource"
IN_FLIGHT = 100
"""Executions of a compiled graph that are in flight at most. With ten, Ray's default, a task takes
longer; with a thousand longer still, and compiling takes minutes."""


@dataclass(frozen=True)
class Peer:
    """One other runtime.

    Attributes:
        name: what users choose it by.
        runtime: what results call it.
        empty: runs so many empty tasks on so many workers and returns the seconds it took.
        share: which part of charioteer's number of tasks it gets, so that runs take alike.
        own_process: whether it runs in a process of its own.
    """

    name: str
    runtime: str
    empty: Callable[[int, int], float]
    share: float
    own_process: bool = False


def load(module: str) -> Any:
    """Import a peer's module.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise Missing(f"{package} is not installed") from error


def _thread_pool(tasks: int, workers: int) -> float:
    with ThreadPoolExecutor(workers) as executor:
        start = perf_counter()
        for index in range(tasks):

            def task() -> int:
                return index

            executor.submit(task)
    return perf_counter() - start


def _joblib(tasks: int, workers: int) -> float:
    joblib = load("joblib")
    if workers == 1:
        raise Missing("with one worker joblib calls in a loop, without tasks")

    def task(index: int) -> Callable[[], int]:
        return lambda: index

    with joblib.Parallel(n_jobs=workers, backend="threading") as parallel:
        start = perf_counter()
        parallel(joblib.delayed(task(index))() for index in range(tasks))
        return perf_counter() - start


def _dask(tasks: int, workers: int) -> float:
    dask = load("dask")

    def task(index: int) -> Callable[[], int]:
        return lambda: index

    start = perf_counter()
    delayed = [dask.delayed(task(index), pure=False)() for index in range(tasks)]
    dask.compute(*delayed, scheduler="threads", num_workers=workers)
    return perf_counter() - start


def _distributed(tasks: int, workers: int) -> float:
    distributed = load("distributed")

    def task(index: int) -> Callable[[], int]:
        return lambda: index

    with distributed.Client(
        processes=False,
        n_workers=1,
        threads_per_worker=workers,
        dashboard_address=None,
        silence_logs=50,
    ) as client:
        client.submit(task(0), pure=False).result()
        start = perf_counter()
        futures = [client.submit(task(index), pure=False) for index in range(tasks)]
        client.gather(futures)
        return perf_counter() - start


@contextlib.contextmanager
def started_ray(
    workers: int, resources: dict[str, float] | None = None, *, niceness: int = 0
) -> Iterator[Any]:
    """Ray's module, with that many workers and custom resources while the block runs.

    Args:
        workers: how many.
        resources: how much of each there is.
        niceness: that of worker processes, above that of this one. Ray's default is 15.

    Raises:
        Missing: Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", str(niceness))
    ray = load("ray")
    ray.init(
        num_cpus=workers,
        resources=resources,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        configure_logging=False,
        # The default is a third of the machine's memory, and these tasks store next to nothing.
        object_store_memory=100 * 2**20,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


SETTLING = 1.0
"""Seconds of rest after compiling a graph on Ray. It takes worker processes, and Ray starts others
in their place, which would go on beside the first executions."""


def _ray(tasks: int, workers: int) -> float:
    with started_ray(workers) as ray:

        def task(index: int) -> int:
            return index

        remote = ray.remote(task)
        # Ray starts a worker process at the first task that needs one.
        ray.get([remote.remote(index) for index in range(10 * workers)])
        start = perf_counter()
        ray.get([remote.remote(index) for index in range(tasks)])
        return perf_counter() - start


def _ray_actors(width: int, devices: int, tasks: int) -> float:
    # On fewer cores than actors it takes half as long if those give way to this process.
    with started_ray(devices, niceness=15) as ray:

        class Device:
            def run(self) -> None:
                return None

        actor = ray.remote(num_cpus=0)(Device)
        actors = [actor.remote() for _ in range(devices)]
        ray.get([one.run.remote() for one in actors])
        start = perf_counter()
        # The sets take turns, as tasks that may have any devices would.
        ray.get(
            [
                actors[(task * width + member) % devices].run.remote()
                for task in range(tasks)
                for member in range(width)
            ]
        )
        return perf_counter() - start


def _ray_compiled(width: int, devices: int, tasks: int) -> float:
    with started_ray(devices) as ray:
        dag = load("ray.dag")

        class Device:
            def run(self, _: object) -> None:
                return None

        actor = ray.remote(num_cpus=0)(Device)
        actors = [actor.remote() for _ in range(devices)]
        # An actor is part of one compiled graph at a time, so the sets have no device in common.
        graphs = []
        for first in range(0, devices - width + 1, width):
            with dag.InputNode() as given:
                calls = [one.run.bind(given) for one in actors[first : first + width]]
            graphs.append(
                dag.MultiOutputNode(calls).experimental_compile(
                    _max_inflight_executions=IN_FLIGHT, _buffer_size_bytes=1_000
                )
            )
        for graph in graphs:
            ray.get(graph.execute(b""))
        sleep(SETTLING)
        pending: deque[Any] = deque()
        start = perf_counter()
        for task in range(tasks):
            if len(pending) == IN_FLIGHT * len(graphs):
                ray.get(pending.popleft())
            pending.append(graphs[task % len(graphs)].execute(b""))
        while pending:
            ray.get(pending.popleft())
        return perf_counter() - start


def _ray_resources(width: int, devices: int, tasks: int) -> float:
    with started_ray(devices, {"device": devices}) as ray:

        def task() -> None:
            return None

        remote = ray.remote(num_cpus=0, resources={"device": width})(task)
        # Ray starts a worker process at the first task that needs one.
        ray.get([remote.remote() for _ in range(10 * devices)])
        start = perf_counter()
        ray.get([remote.remote() for _ in range(tasks)])
        return perf_counter() - start


MULTI_DEVICE = {
    "ray-actors": _ray_actors,
    "ray-compiled": _ray_compiled,
    "ray-resources": _ray_resources,
}
"""Run so many empty tasks, each over ``width`` of some devices, and return the seconds it took."""

PEERS = {
    peer.name: peer
    for peer in (
        Peer("threadpool", THREAD_POOL, _thread_pool, 0.2),
        Peer("joblib", "joblib threads", _joblib, 0.1),
        Peer("dask", "Dask threads", _dask, 0.02),
        Peer("distributed", "Dask distributed", _distributed, 0.003, own_process=True),
        Peer("ray", "Ray", _ray, 0.01, own_process=True),
    )
}
