"""The version, and what it was tested with, in one place: the package's metadata and every run record read it here."""

__version__ = "0.1.0"

#: The newest PyTorch that the whole suite was run with (docs/tested.md); a newer one works as far as anybody knows.
TESTED_TORCH = "2.15.0"
