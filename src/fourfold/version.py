"""The version of the package, of config files and of checkpoints."""

__version__ = "0.1.0"

SCHEMA_VERSION = 1
"""Version of the config keys; a config file may carry `schema_version`."""

FORMAT_VERSION = 1
"""Version of the checkpoint folder's layout."""
