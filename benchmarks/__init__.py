"""vitfast's benchmark suite: `vitfast bench`, `vitfast tune`, `pytest benchmarks/` and `benchmarks/gpu_day.sh`.

`workloads` says what is measured, `peers` holds one file per implementation that is measured, `vitfast.clock` is the
clock, `runner` puts the three together and keeps what came out; `report` only reads results.
"""
