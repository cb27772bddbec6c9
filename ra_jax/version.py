"""The version, apart from the package's front door, so that any room may read it."""

__version__ = "0.2.0"
