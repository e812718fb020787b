"""Benchmarks of jflash beside every peer that is installed: `python -m bench`."""
