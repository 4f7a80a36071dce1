"""2-D Fourier transforms, each a task over several devices.

Each transform is one task that holds a set of GPUs at once, all of it or none. The runtime splits
the image into bands of rows, one a device, and its transform into bands of columns
(``shards=``). Every device transforms its rows, cuts the result into blocks and packs each for the
device that gets it; ``ctx.barrier()`` makes the streams of the set wait for each other, on the
devices; then every device fetches its blocks over the links and transforms its columns. The host
enqueues all that and waits once, for all results.

    pip install charioteer
    python examples/apps/fft2d.py                        # the GPUs of this machine, else its cores
    python examples/apps/fft2d.py --machine virtual:4

Transforms of different images are independent, so two sets of two devices work side by side on four
GPUs, and the host runs ahead of both. Without GPUs each is a task on a core. Each result is checked
against ``numpy.fft.fft2``; the exit status is 1 if one of them disagrees.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch
from charioteer import cpu, gpu

Images = npt.NDArray[np.float64]
Spectra = npt.NDArray[np.complex128]

SIZES = {"tiny": (3, 31), "small": (16, 128), "medium": (16, 512), "large": (24, 1024)}
"""Images, and their rows and columns."""
WIDTH = 2
"""Devices of a transform, where there are as many."""


@dataclass
class Problem:
    """Images to be transformed, in one array."""

    images: Images

    @cached_property
    def right(self) -> Spectra:
        """NumPy's transforms in two dimensions."""
        return np.fft.fft2(self.images)


def problem(count: int, size: int) -> Problem:
    """Images at random."""
    return Problem(np.random.default_rng(0).standard_normal((count, size, size)))


@ch.task(placement=[gpu, cpu])
def transform(image: ch.In[Any], spectrum: ch.Out[Any]) -> None:
    """The transform of an image on one device, rows and then columns."""
    fft = ch.current().xp.fft.fft
    spectrum[...] = fft(fft(image, axis=1), axis=0)


@transform.variant(gpu * WIDTH, shards={"image": 0, "spectrum": 1})
def on_set(image: ch.In[Any], spectrum: ch.Out[Any]) -> None:
    """The same on a set of devices: each has a band of rows, and makes a band of columns."""
    context = ch.current()
    rows, columns = cuts(image, axis=0), cuts(spectrum, axis=1)

    packed = []  # packed[i][j]: what device i has for device j
    for _, band in zip(context.each(), image, strict=True):
        transformed = context.xp.fft.fft(band, axis=1)
        packed.append([transformed[:, block].copy() for block in columns])

    # Before this a device may still write what another one is about to fetch.
    context.barrier()

    for j, _ in enumerate(context.each()):
        band = spectrum[j]
        for i, own in enumerate(rows):
            band[own] = packed[i][j]
        band[...] = context.xp.fft.fft(band, axis=0)


def cuts(bands: Sequence[Any], axis: int) -> list[slice]:
    """Where bands begin and end, along their axis."""
    edges = [0, *itertools.accumulate(band.shape[axis] for band in bands)]
    return [slice(begin, end) for begin, end in itertools.pairwise(edges)]


def tasks(given: Problem, gpus: int = 0) -> Spectra:
    """The transforms, each on :data:`WIDTH` devices; on one, or on a core, if there are fewer."""
    on = gpu * WIDTH if gpus >= WIDTH else gpu if gpus else cpu
    spectra = np.empty(given.images.shape, complex)
    images, results = ch.asarray(given.images), ch.asarray(spectra)
    for image, spectrum in zip(images, results, strict=True):
        transform.options(placement=on)(image, spectrum)
    results.release()  # waits for all, and gives the memory back
    return spectra


def by_hand(given: Problem, every: application.Every) -> Spectra:
    """The same with plain NumPy; ``every`` calls a function with each number."""
    spectra = np.empty(given.images.shape, complex)

    def one(at: int) -> None:
        spectra[at] = np.fft.fft(np.fft.fft(given.images[at], axis=1), axis=0)

    every(one, range(len(spectra)))
    return spectra


def serially(given: Problem) -> Spectra:
    """One image after the other."""
    return by_hand(given, application.in_turn)


def threads(given: Problem, workers: int) -> Spectra:
    """Images on threads by hand."""
    with application.side_by_side(workers) as every:
        return by_hand(given, every)


def error(found: Spectra, given: Problem) -> float:
    """The largest difference from NumPy's transforms, over the size of an image."""
    return float(np.abs(found - given.right).max() / given.images[0].size)


LIMIT = 1e-11
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (transform.fn, on_set, cuts, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ()
"""Nothing is left to the runtime: ``tasks`` says where transforms run."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
