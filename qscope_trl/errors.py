"""Errors and warnings of the package.

Every error that a user can cause derives from `QScopeError` and from the built-in it resembles, so `except ValueError`
keeps working. Messages say what was found, why it matters and what to do.
"""


class QScopeError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(QScopeError, ValueError):
    """A checkpoint, of SAEs or of a training run, is missing, damaged, of the wrong shape or of an unknown format."""


class FeatureSetError(QScopeError, ValueError):
    """A FeatureSet is malformed, or was made for another model or another SAE."""


class RuleError(QScopeError, ValueError):
    """A rule over features is malformed, names what is not there, or was made for another SAE."""


class ConfigError(QScopeError, ValueError):
    """A configuration value, key or flag does not fit."""


class DataError(QScopeError, ValueError):
    """A dataset lacks a column, a group or any usable text."""


class ModelStructureError(QScopeError, TypeError):
    """The model has no decoder layers that can be found, or not the asked-for ones."""


class AttachError(QScopeError, RuntimeError):
    """The penalty cannot join this trainer's loss."""


class SteeringError(QScopeError, RuntimeError):
    """Steering did not reach the model, or cannot be told where to act."""


class PenaltySelfCheckError(QScopeError, RuntimeError):
    """The penalty was attached, but a training step shows that it does not act."""


class NonFiniteError(QScopeError, ArithmeticError):
    """Activations at penalised tokens are NaN or infinite."""


class KernelError(QScopeError, RuntimeError):
    """A compiled kernel was asked for and cannot be had."""


class EndpointError(QScopeError, ConnectionError):
    """A language model behind an endpoint cannot be reached, refuses, or has stopped answering."""


class QScopeWarning(UserWarning):
    """Something works, but not in the way a user might expect."""
