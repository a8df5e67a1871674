"""What can be wrong with a model directory. All of these are permanent: a retry changes nothing.

ConfigurationError
├── ModelConfigError    config.json is missing, malformed, or asks for what is not supported
└── WeightsError        the safetensors files are missing, malformed, or do not fit config.json
"""

from __future__ import annotations

from penstock_runtime.errors import ConfigurationError


class ModelConfigError(ConfigurationError):
    """config.json is missing, malformed, or describes something that is not supported."""


class WeightsError(ConfigurationError):
    """The safetensors files are missing, malformed, incomplete, or do not fit config.json."""
