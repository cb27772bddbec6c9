"""The version of the package. It has its own module so that all modules can import it."""

__version__ = "0.2.0"
