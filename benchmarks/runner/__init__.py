"""The runner: candidates of a workload held to the parity rule, timed together, kept as rows of a file."""
