"""Explainers in files: a PT2 archive, and what it says, read without running anything of it."""
