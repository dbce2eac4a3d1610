"""The version, in one place: the package's metadata and every run record read it here."""

__version__ = "0.1.0"
