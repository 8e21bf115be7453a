"""What is measured: workloads, each with its sizes, its work, its inputs and its reference."""
