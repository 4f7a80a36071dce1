"""Inference in stages over devices, with dynamic batches.

Requests come one after the other, and want so many tokens each. A model is a chain of stages, each
on a device of its own that keeps its weights. A batch goes through all stages for one token of each
of its requests; who has all its tokens leaves it, and who waits takes its place before the next
token. As many batches are under way as there are stages, so that every device has one. What a
request gets does not depend on whom it shares a batch with: the model computes with whole numbers.

    pip install charioteer
    python examples/apps/inference.py                        # the GPUs there are, else cores
    python examples/apps/inference.py --machine virtual:4

The exit status is 1 if a request got other tokens than it gets alone.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch

Ints = npt.NDArray[np.int64]

SIZES = {
    "tiny": (7, 16, 3),
    "small": (24, 64, 4),
    "medium": (96, 256, 8),
    "large": (128, 512, 16),
}
"""Requests, width of the model, requests of a batch at most."""
STAGES = 4
PRIME = 8191
WORDS = 1000


@dataclass
class Request:
    """What is asked, how many tokens it wants, and those that it has."""

    state: Ints
    wanted: int
    tokens: list[int] = field(default_factory=list)


@dataclass
class Problem:
    """Weights of the stages, requests, and how many share a batch at most."""

    weights: list[Ints]
    prompts: list[Ints]
    wanted: list[int]
    most: int

    def requests(self) -> list[Request]:
        """The requests, as they come in."""
        return [Request(p.copy(), n) for p, n in zip(self.prompts, self.wanted, strict=True)]

    @cached_property
    def tokens(self) -> list[list[int]]:
        """What each request gets alone."""
        return serially(self)


def problem(requests: int, width: int, most: int) -> Problem:
    """A model at random, and requests of up to a dozen tokens."""
    chance = np.random.default_rng(11)
    return Problem(
        [chance.integers(0, PRIME, (width, width)) for _ in range(STAGES)],
        [chance.integers(0, PRIME, width) for _ in range(requests)],
        [int(n) for n in chance.integers(1, 13, requests)],
        most,
    )


def layer(states: Any, weights: Any) -> Any:
    """What a stage makes of the states of a batch, a row a request."""
    mixed = (states @ weights) % PRIME
    return (mixed * mixed + states) % PRIME


@ch.task
def stage(states: Any, weights: ch.In[Any]) -> Any:
    """A stage of the model, on its device, where its weights stay."""
    xp = ch.current().xp
    if xp is np:
        here = states
    elif isinstance(states, np.ndarray):
        here = xp.asarray(states)
    else:
        here = xp.empty(states.shape, np.int64)
        xp.copyto(here, states)
    return layer(here, weights)


@ch.task
def sample(states: Any, batch: list[Request]) -> None:
    """On a core: a token for each request of a batch."""
    rows = states if isinstance(states, np.ndarray) else states.get()
    for request, row in zip(batch, rows, strict=True):
        request.state = row
        request.tokens.append(int(row.sum() % WORDS))


def refilled(batch: list[Request], waiting: deque[Request], most: int) -> list[Request]:
    """A batch for its next token: without those that have all theirs, with others that wait."""
    batch = [request for request in batch if len(request.tokens) < request.wanted]
    while len(batch) < most:
        try:
            batch.append(waiting.popleft())
        except IndexError:  # nobody waits
            break
    return batch


@ch.task
async def lane(weights: list[ch.Array], waiting: deque[Request], most: int, gpus: int) -> None:
    """One batch under way, until nobody waits."""
    batch: list[Request] = []
    while batch := refilled(batch, waiting, most):
        states: Any = np.stack([request.state for request in batch])
        for at in range(STAGES):
            on = ch.gpu(at % gpus) if gpus else ch.cpu
            states = stage.options(placement=on)(states, weights[at])
        await sample.options(placement=ch.cpu, priority=1)(states, list(batch))


def tasks(given: Problem, gpus: int = 0) -> list[list[int]]:
    """The tokens of all requests."""
    requests = given.requests()
    waiting = deque(requests)
    weights = [ch.asarray(each) for each in given.weights]
    ch.wait([lane(weights, waiting, given.most, gpus) for _ in range(STAGES)])
    return [request.tokens for request in requests]


def serially(given: Problem) -> list[list[int]]:
    """One request after the other, each alone."""
    requests = given.requests()
    for request in requests:
        for _ in range(request.wanted):
            states: Any = request.state[None, :]
            for weights in given.weights:
                states = layer(states, weights)
            sample.fn(states, [request])
    return [request.tokens for request in requests]


def threads(given: Problem, workers: int) -> list[list[int]]:
    """Batches on threads by hand: each has one under way, and takes it through all stages."""
    requests = given.requests()
    waiting = deque(requests)

    def serve() -> None:
        batch: list[Request] = []
        while batch := refilled(batch, waiting, given.most):
            states: Any = np.stack([request.state for request in batch])
            for weights in given.weights:
                states = layer(states, weights)
            sample.fn(states, batch)

    with ThreadPoolExecutor(workers) as executor:
        for served in [executor.submit(serve) for _ in range(workers)]:
            served.result()
    return [request.tokens for request in requests]


def error(found: list[list[int]], given: Problem) -> float:
    """How many requests got other tokens than alone."""
    return float(sum(a != b for a, b in zip(found, given.tokens, strict=True)))


LIMIT = 0.0
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (stage.fn, sample.fn, refilled, lane.fn, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ()
"""Nothing is left to the runtime: stages stay where their weights are."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
