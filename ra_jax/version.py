"""The version of the package. It has its own module, so that every other module can import it."""

__version__ = "0.2.0"
