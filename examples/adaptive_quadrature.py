"""Adaptive quadrature: a task graph that nobody knows before it has run.

The integrand is an absorption spectrum, a sum of a thousand Lorentzian lines whose widths span
three decades. Where lines are narrow an interval has to be halved again and again, where there are
none it is done at once. So the tree of intervals is deep in some places and shallow in others, and
only the computation itself finds out where.

Each interval is a task. It compares the Gauss rule on the whole with the rule on the two halves; if
they disagree it spawns a task for each half and awaits them. A task that awaits others holds no
thread, so the depth of the tree costs nothing, and idle workers take whatever interval is there,
which balances the load by itself.

    pip install "charioteer[demo]"
    python examples/adaptive_quadrature.py

The sum over the tree is taken in the tree's order, not in that of completion, so the answer equals
that of the serial recursion bit for bit. It is checked against that, against
``scipy.integrate.quad`` and against the closed form; the exit status is 1 if one of them disagrees.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.integrate

import charioteer as ch

Vector = npt.NDArray[np.float64]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)

# Rounding moves a point by up to 1e-16, which is 1e-11 of the narrowest line. Two estimates cannot
# be asked to agree any closer: intervals would be halved without end.
FINEST = 1e-10


@dataclass(frozen=True)
class Spectrum:
    """Lorentzian lines; all three are vectors of the same length."""

    centers: Vector
    widths: Vector
    strengths: Vector

    @classmethod
    def random(cls, lines: int, seed: int = 0) -> "Spectrum":
        """``lines`` lines between 0 and 1, crowded around a few places, as lines are."""
        random = np.random.default_rng(seed)
        bands = random.choice([0.13, 0.37, 0.41, 0.88], lines)
        return cls(
            centers=bands + 0.02 * random.standard_normal(lines),
            widths=10.0 ** random.uniform(-5.0, -2.0, lines),
            strengths=random.exponential(1.0 / lines, lines),
        )

    def __call__(self, x: Vector | float) -> Vector:
        """The absorption at the points ``x``, in the shape of ``x``."""
        # One matrix of points by lines, updated in place: NumPy releases the GIL for each step.
        terms = np.subtract.outer(x, self.centers)
        terms /= self.widths
        terms *= terms
        terms += 1.0
        np.divide(self.strengths / (np.pi * self.widths), terms, out=terms)
        return np.asarray(terms.sum(axis=-1))

    def exact(self, a: float, b: float) -> float:
        """The integral from ``a`` to ``b`` in closed form."""
        angle = np.arctan((b - self.centers) / self.widths) - np.arctan(
            (a - self.centers) / self.widths
        )
        return float(np.sum(self.strengths * angle)) / np.pi


def gauss(f: Spectrum, a: float, b: float) -> float:
    """The Gauss rule of 20 points for the integral of ``f`` from ``a`` to ``b``."""
    half = 0.5 * (b - a)
    return half * float(WEIGHTS @ f(0.5 * (a + b) + half * NODES))


def agree(whole: float, halves: float, tolerance: float) -> bool:
    """Whether two estimates of an integral differ by no more than the part allowed.

    The integrand is positive, so the errors allowed on all pieces add up to that part of the whole.
    """
    return abs(halves - whole) <= tolerance * abs(halves)


@ch.task
async def integrate(f: Spectrum, a: float, b: float, whole: float, tolerance: float) -> float:
    """The integral of ``f`` from ``a`` to ``b``, where the plain rule gives ``whole``."""
    middle = 0.5 * (a + b)
    left, right = gauss(f, a, middle), gauss(f, middle, b)
    if agree(whole, left + right, tolerance):
        return left + right
    left_task = integrate(f, a, middle, left, tolerance)
    right_task = integrate(f, middle, b, right, tolerance)
    return await left_task + await right_task


def integrate_serially(
    f: Spectrum, a: float, b: float, whole: float, tolerance: float
) -> tuple[float, int, int]:
    """The same without tasks: the integral, the number of intervals, the depth of the tree."""
    middle = 0.5 * (a + b)
    left, right = gauss(f, a, middle), gauss(f, middle, b)
    if agree(whole, left + right, tolerance):
        return left + right, 1, 1
    left, n, depth = integrate_serially(f, a, middle, left, tolerance)
    right, m, other = integrate_serially(f, middle, b, right, tolerance)
    return left + right, n + m + 1, max(depth, other) + 1


def main(argv: Sequence[str] | None = None) -> int:
    """Integrate, check, print; returns the exit status."""
    parser = argparse.ArgumentParser(description="Adaptive quadrature as a dynamic task graph.")
    parser.add_argument("--lines", type=int, default=1000, help="lines of the spectrum")
    parser.add_argument("--tolerance", type=float, default=1e-9, help="relative error allowed")
    parser.add_argument("--workers", type=int, help="workers (default: the usable cores)")
    options = parser.parse_args(argv)
    if options.lines < 1:
        parser.error("a spectrum has at least one line")
    if not options.tolerance >= FINEST:
        parser.error(f"the tolerance must be at least {FINEST:g}")
    f, tolerance = Spectrum.random(options.lines), options.tolerance

    start = time.perf_counter()
    serial, tasks, depth = integrate_serially(f, 0.0, 1.0, gauss(f, 0.0, 1.0), tolerance)
    serial_seconds = time.perf_counter() - start

    with ch.Runtime(workers=options.workers) as runtime:
        start = time.perf_counter()
        answer = integrate(f, 0.0, 1.0, gauss(f, 0.0, 1.0), tolerance).result()
        seconds = time.perf_counter() - start
        workers = runtime.workers

    exact = f.exact(0.0, 1.0)
    peer, _ = scipy.integrate.quad(f, 0.0, 1.0, epsabs=0.0, epsrel=tolerance, limit=50 * tasks)
    print(f"integral      {answer:.12f}")
    print(f"closed form   {exact:.12f}  off by {abs(answer - exact):.1e}")
    print(f"scipy's quad  {peer:.12f}  off by {abs(answer - peer):.1e}")
    print(f"{tasks:,} intervals in a tree {depth} deep")
    print(
        f"serial {serial_seconds:.3f} s, {workers} workers {seconds:.3f} s: "
        f"{serial_seconds / seconds:.2f} times as fast"
    )

    failed = [
        name
        for name, wrong in {
            "the serial recursion": answer != serial,
            "the closed form": abs(answer - exact) > tolerance * exact,
            # Both may be off by the tolerance, in opposite directions.
            "scipy.integrate.quad": abs(answer - peer) > 2.0 * tolerance * exact,
        }.items()
        if wrong
    ]
    for name in failed:
        print(f"check failed: {name} gives another answer")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
