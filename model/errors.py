"""The base of every error that a user can correct.

UserError                 one message, no traceback, exit status 2
+-- ConfigError           a recipe or override that cannot work (this module)
+-- WeightsError          a file of weights that cannot be read or used (this module)
+-- data_pipeline.errors  a data set, manifest, shard or store that cannot be used
+-- trainer.errors        a run that cannot start, resume or go on
"""


class UserError(ValueError):
    """A mistake that the user can correct. The message names the thing, its value and the remedy."""


class ConfigError(UserError):
    """A setting that does not exist, has a wrong value, or contradicts another one."""


class WeightsError(UserError):
    """A file of weights that cannot be read, does not belong to a model, or cannot be written in some format."""


def require_at_least(minimum: float, **settings: float) -> None:
    """Raise ConfigError for the first setting below `minimum`; keywords are dotted paths with `__` for the dot."""
    for name, value in settings.items():
        if not value >= minimum:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; it must be at least {minimum:g}")


def require_positive(**settings: float) -> None:
    """Raise ConfigError for the first setting that is not above 0; names as in `require_at_least`."""
    for name, value in settings.items():
        if not value > 0:
            raise ConfigError(f"{name.replace('__', '.')} is {value}; it must be above 0")
