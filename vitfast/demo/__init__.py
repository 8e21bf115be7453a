"""The demo: a photograph through a plain and an accelerated model, and a page about it."""
