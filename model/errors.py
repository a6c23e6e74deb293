"""Base classes of the errors that a user can correct.

UserError                 `m2f` prints one message without a traceback and exits with status 2
+-- ConfigError           a recipe or override that cannot work (this module)
+-- WeightsError          a weights file that cannot be read or used (this module)
+-- MissingExtraError     a package that is not installed (model.extras)
+-- data_pipeline.errors  a data set, manifest, shard or store that cannot be used
+-- trainer.errors        a run that cannot start, resume or continue
+-- eval.errors           results that cannot be computed, merged or published
+-- cluster               further classes, each in the module that raises it
"""


class UserError(ValueError):
    """A mistake that the user can correct. The message names the setting or file, its value and the remedy."""


class ConfigError(UserError):
    """A setting that does not exist, has a wrong value, or contradicts another one."""


class WeightsError(UserError):
    """A weights file that cannot be read, does not fit the model, or cannot be written in some format."""
