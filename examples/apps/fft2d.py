"""A 2-D Fourier transform as one task over several devices.

Each transform is one task that holds a set of GPUs at once, all of it or none. The image is cut
into bands of rows, one a device. Every device transforms its rows, cuts the result into blocks and
packs each for the device that gets it; ``ctx.barrier()`` makes the streams of the set wait for each
other, on the devices; then every device fetches its blocks over the links and transforms its
columns. The host enqueues all that and waits once, for the result.

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

import application
import numpy as np
import numpy.typing as npt

import charioteer as ch

Image = npt.NDArray[np.float64]
Spectrum = npt.NDArray[np.complex128]


def cuts(extent: int, parts: int) -> list[slice]:
    """``parts`` ranges of an axis, as equal as they can be."""
    edges = [extent * part // parts for part in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def fft2(image: Image) -> Spectrum:
    """The transform of an image on the devices of the running task."""
    context = ch.current()
    height, width = image.shape
    rows = cuts(height, len(context.devices))
    columns = cuts(width, len(context.devices))

    packed = []  # packed[i][j]: what device i has for device j
    for _, own in zip(context.each(), rows, strict=True):
        xp = context.xp
        transformed = xp.fft.fft(xp.asarray(image[own]), axis=1)
        packed.append([transformed[:, block].copy() for block in columns])

    # Before this a device may still write what another one is about to fetch.
    context.barrier()

    bands = []
    for j, _ in enumerate(context.each()):
        xp = context.xp
        band = xp.empty((height, columns[j].stop - columns[j].start), complex)
        for i, own in enumerate(rows):
            band[own] = packed[i][j]
        bands.append(xp.fft.fft(band, axis=0))
    return np.concatenate([band.get() for band in bands], axis=1)


SIZES = {"tiny": (3, 31), "small": (16, 128), "medium": (16, 512), "large": (24, 1024)}
"""Images, and their rows and columns."""
WIDTH = 2
"""Devices of a transform, where there are as many."""


@dataclass
class Problem:
    """Images to be transformed."""

    images: list[Image]


def problem(count: int, size: int) -> Problem:
    """Images at random."""
    chance = np.random.default_rng(0)
    return Problem([chance.standard_normal((size, size)) for _ in range(count)])


def fft2_on_core(image: Image) -> Spectrum:
    """The transform of an image on a core, by NumPy, rows and then columns."""
    return np.fft.fft(np.fft.fft(image, axis=1), axis=0)


def tasks(given: Problem, gpus: int = 0) -> list[Spectrum]:
    """The transforms, each on :data:`WIDTH` devices, or where there are none on a core."""
    if gpus:
        transform = ch.task(fft2, placement=ch.gpu * min(WIDTH, gpus))
    else:
        transform = ch.task(fft2_on_core)
    return [task.result() for task in [transform(image) for image in given.images]]


def serially(given: Problem) -> list[Spectrum]:
    """One image after the other."""
    return [fft2_on_core(image) for image in given.images]


def threads(given: Problem, workers: int) -> list[Spectrum]:
    """Images on threads by hand."""
    with application.side_by_side(workers) as every:
        return every(lambda at: fft2_on_core(given.images[at]), range(len(given.images)))


def error(found: list[Spectrum], given: Problem) -> float:
    """The largest difference from NumPy's transforms in two dimensions, over the size."""
    return max(
        float(np.abs(spectrum - np.fft.fft2(image)).max()) / image.size
        for spectrum, image in zip(found, given.images, strict=True)
    )


LIMIT = 1e-11
"""What that may be."""
CORE: Sequence[Callable[..., object]] = (cuts, fft2, fft2_on_core, tasks)
"""What a user writes: bodies and the program that spawns them."""
PORTABLE = ()
"""Nothing is left to the runtime: ``tasks`` says where transforms run."""


if __name__ == "__main__":
    sys.exit(application.main(sys.modules[__name__]))
