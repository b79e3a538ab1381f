"""Configurations: composed by Hydra, checked against constructors, built by us.

After composition everything is a plain dict, in which a mapping with `_target_` stands for an object of that class or,
with `_partial_: true`, for its constructor.
"""

from hybridlab.config.compose import HASHED, check, compose, fingerprint, main
from hybridlab.config.nodes import ConfigError, build

__all__ = ["HASHED", "ConfigError", "build", "check", "compose", "fingerprint", "main"]
