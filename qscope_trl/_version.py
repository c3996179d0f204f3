"""Version of the package, apart from `__init__` so that the build reads it without importing anything."""

__version__ = "0.1.0"
