"""BLAS and OpenMP follow the cores of tasks.

Each test runs in a process of its own: whoever set a limit there before, as a test that enters
``threadpool_limits`` does, could hide that a worker's limit is ignored.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

PROLOGUE = """
import numpy
import threadpoolctl
import charioteer as ch

def limits(use="blas"):
    pools = threadpoolctl.threadpool_info()
    return [pool["num_threads"] for pool in pools if pool["user_api"] == use]

def wide_limits(use="blas"):
    return ch.spawn(placement=ch.cpu * 2)(lambda: limits(use)).result()
"""


def run(code: str, prologue: str = PROLOGUE) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", prologue + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=50,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def blas_has_threads() -> bool:
    """Whether NumPy's BLAS can be told to use two threads."""
    code = "with threadpoolctl.threadpool_limits(2): raise SystemExit(set(limits()) != {2})"
    return not subprocess.run([sys.executable, "-c", PROLOGUE + code], timeout=50).returncode


pytestmark = pytest.mark.skipif(
    not blas_has_threads(), reason="NumPy's BLAS has no control of its threads"
)

# Not imported here, which would leave the threads of its BLAS behind.
needs_scipy = pytest.mark.skipif(find_spec("scipy") is None, reason="needs SciPy")
needs_sklearn = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn")


def test_a_wide_body_has_the_threads_of_its_cores() -> None:
    run("""
        before = limits()
        with ch.Runtime(workers=2) as rt:
            for _ in range(5):
                assert set(wide_limits()) == {2}, wide_limits()
                assert set(rt.submit(limits).result()) == {1}
        assert limits() == before
    """)


@needs_scipy
def test_every_copy_of_openblas_follows() -> None:
    run("""
        with ch.Runtime(workers=2) as rt:
            assert set(rt.submit(limits).result()) == {1}
            first = len(limits())
            import scipy.linalg
            assert set(rt.submit(limits).result()) == {1}
            assert set(wide_limits()) == {2}
            assert len(limits()) >= first
            assert set(rt.submit(limits).result()) == {1}
        with ch.Runtime(workers=2) as rt:
            assert set(wide_limits()) == {2}
            assert set(rt.submit(limits).result()) == {1}
    """)


def test_blas_that_a_body_imports_follows_and_gets_its_limit_back() -> None:
    run(
        """
        import charioteer as ch

        def limits():
            import numpy, threadpoolctl
            pools = threadpoolctl.threadpool_info()
            return [pool["num_threads"] for pool in pools if pool["user_api"] == "blas"]

        with ch.Runtime(workers=2) as rt:
            before = rt.submit(limits).result()
            assert set(ch.spawn(placement=ch.cpu * 2)(limits).result()) == {2}
            assert set(rt.submit(limits).result()) == {1}
        assert limits() == before, (limits(), before)
        """,
        prologue="",
    )


def test_closing_on_another_thread_gives_the_limit_back() -> None:
    run("""
        import threading
        before = limits()
        rt = ch.Runtime(workers=2).open()
        rt.submit(wide_limits)
        closing = threading.Thread(target=rt.close)
        closing.start()
        closing.join()
        assert limits() == before
    """)


def test_a_child_of_a_fork_has_the_limit_of_before() -> None:
    run("""
        import os, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        before = limits()
        def fork():
            child = os.fork()
            if not child:
                os._exit(limits() != before)
            return os.waitpid(child, 0)[1]
        with ch.Runtime(workers=2) as rt:
            assert fork() == 0
            assert rt.submit(fork).result() == 0
            assert limits() == [1] * len(before)
    """)


@needs_sklearn
@pytest.mark.parametrize("form", ["with", "async with"])
def test_a_thread_that_runs_bodies_itself_gets_its_openmp_limit_back(form: str) -> None:
    run(f"""
        import asyncio
        import sklearn.cluster
        before = limits("openmp")
        async def main():
            {form} ch.Runtime(workers=0) as rt:
                assert set(rt.submit(limits, "openmp").result()) == {{1}}
            assert limits("openmp") == before
        asyncio.run(main())
    """)


@needs_sklearn
def test_openmp_follows_the_cores_of_the_body() -> None:
    run("""
        import sklearn.cluster
        with ch.Runtime(workers=2) as rt:
            for _ in range(5):
                assert set(wide_limits("openmp")) == {2}
                assert set(rt.submit(limits, "openmp").result()) == {1}
    """)


def test_mkl_is_set_for_each_thread() -> None:
    run("""
        import threading
        from types import SimpleNamespace
        from charioteer import _pools

        class Mkl:
            user_api, internal_api, filepath = "blas", "mkl", "/libmkl_rt.so"
            threading_layer = "intel"
            mine = threading.local()
            dynlib = SimpleNamespace(
                MKL_Set_Num_Threads_Local=lambda threads: setattr(Mkl.mine, "limit", threads)
            )
            @property
            def num_threads(self):
                return getattr(self.mine, "limit", 8)

        mkl = Mkl()
        _pools._known[mkl.filepath] = _pools._Library(mkl)
        with ch.Runtime(workers=2) as rt:
            assert mkl.num_threads == 8  # of this thread, which runs no body
            for _ in range(5):
                assert rt.submit(lambda: mkl.num_threads).result() == 1
                assert ch.spawn(placement=ch.cpu * 2)(lambda: mkl.num_threads).result() == 2
        assert mkl.num_threads == 8
    """)
