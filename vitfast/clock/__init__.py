"""Time and the machine: timing in turns, what the device reaches, and what it is."""
