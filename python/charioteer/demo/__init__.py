"""The demonstration: a real job as one task graph, measured and checked.

Gaussian-process classification of the handwritten digits that scikit-learn ships: the kernel matrix
built in tiles, a tiled Cholesky factorization, the solves and the prediction, ordered by named
dependencies alone.

What lives here: :mod:`~charioteer.demo.kernels` (BLAS and LAPACK on tiles, without the GIL),
:mod:`~charioteer.demo.gp` (the problem, its tiles and the task graph),
:mod:`~charioteer.demo.serial` (the same job as plain loops) and
:mod:`~charioteer.demo.command` (runs, checks, table). Arrows run one way: command uses serial and
gp, serial uses gp, and both use kernels. ``examples/gp_classification.py`` builds on the same
modules.

Importing this package needs nothing more than Charioteer; its modules need SciPy, and the digits
scikit-learn (``pip install "charioteer[demo]"``).
"""

import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = {"scipy": "SciPy", "sklearn": "scikit-learn"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration.

    Args:
        argv: the arguments after ``charioteer demo``; ``sys.argv[1:]`` if left out.

    Returns:
        The exit status: 0, 1 when the result fails its check, 2 when it cannot be run.

    Raises:
        SystemExit: from ``argparse``, after ``--help`` or an argument that does not parse.
    """
    try:
        from .command import run

        return run(sys.argv[1:] if argv is None else argv)
    except ModuleNotFoundError as error:
        package = _EXTRA.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        print(
            f"charioteer demo: error: {package} is not installed; "
            'pip install "charioteer[demo]" brings what the demonstration needs',
            file=sys.stderr,
        )
        return 2
