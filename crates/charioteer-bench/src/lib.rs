//! Benchmarks of the Charioteer core: see `benches/`.
