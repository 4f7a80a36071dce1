"""A 2-D Fourier transform as one task over several devices.

Each transform is one task that holds a set of GPUs at once, all of it or none. The image is cut
into bands of rows, one a device. Every device transforms its rows, cuts the result into blocks and
packs each for the device that gets it; ``ctx.barrier()`` makes the streams of the set wait for each
other, on the devices; then every device fetches its blocks over the links and transforms its
columns. The host enqueues all that and waits once, for the result.

    pip install charioteer
    python examples/apps/fft2d.py                      # 4 virtual GPUs, 2 a transform
    python examples/apps/fft2d.py --gpus 8 --width 4
    python examples/apps/fft2d.py --gpus 0             # the GPUs of this machine

Transforms of different images are independent, so two sets of two devices work side by side on four
GPUs, and the host runs ahead of both. Each result is checked against ``numpy.fft.fft2``; the exit
status is 1 if one of them disagrees.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Transform some images, check all results, and tell how long it took."""
    parser = argparse.ArgumentParser(description="2-D transforms, each over several devices")
    parser.add_argument("--gpus", type=int, default=4, help="virtual GPUs; 0 for real ones")
    parser.add_argument("--width", type=int, default=2, help="devices of one transform")
    parser.add_argument("--images", type=int, default=16, help="how many images")
    parser.add_argument("--size", type=int, default=256, help="rows and columns of an image")
    options = parser.parse_args(arguments)

    random = np.random.default_rng(0)
    images = [random.standard_normal((options.size, options.size)) for _ in range(options.images)]
    transform = ch.task(fft2, placement=ch.gpu * options.width)
    machine = ch.Machine.virtual(gpus=options.gpus) if options.gpus else ch.Machine.detect()
    with ch.Runtime(machine):
        start = time.perf_counter()
        spectra = [task.result() for task in [transform(image) for image in images]]
        seconds = time.perf_counter() - start

    worst = max(
        float(np.abs(spectrum - np.fft.fft2(image)).max())
        for image, spectrum in zip(images, spectra, strict=True)
    )
    print(
        f"{len(images)} transforms of {options.size} x {options.size}, {options.width} of"
        f" {len(machine.gpus)} devices each: {1e3 * seconds:.0f} ms, largest difference {worst:.1e}"
    )
    return 0 if worst <= 1e-11 * options.size**2 else 1


if __name__ == "__main__":
    sys.exit(main())
