"""Benchmarks of the runtime, beside the runtimes a user would otherwise take.

What lives here: :mod:`~charioteer.bench.records` (what one result says and where it is written),
:mod:`~charioteer.bench.harness` (contestants, interleaved rounds, bars),
:mod:`~charioteer.bench.peers` (the other runtimes), :mod:`~charioteer.bench.probes` (measurements
that need a process of their own), :mod:`~charioteer.bench.runners` (how each runtime runs a task
graph), :mod:`~charioteer.bench.report` (tables), :mod:`~charioteer.bench.pages` and
:mod:`~charioteer.bench.plots` (reports), :mod:`~charioteer.bench.study` (all of it in one go), and
one module a benchmark, such as :mod:`~charioteer.bench.overhead`.

Arrows run one way: benchmarks use peers, probes, harness and report; those use records. Nothing in
``import charioteer`` imports this package.
"""
