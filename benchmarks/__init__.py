"""vitfast's benchmark suite: `vitfast bench`, `vitfast tune`, `pytest benchmarks/` and `benchmarks/gpu.sh`.

`registry` says what is measured, `peers` holds one file per implementation that is measured, `measure` is the clock,
`run` puts the three together and `results` keeps what came out; `report` and `compare` only read results.
"""
