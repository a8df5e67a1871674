"""The router's errors.

RouterError
├── ConfigurationError        the router cannot start: says what to change
│   └── ModelUnusable         the model's files are not there or not as they should be
├── KubernetesError           the Kubernetes API refused, or did not answer
│   └── KubernetesGarbage     it answered with what cannot be understood
└── ApiError                  an answer to a client, in OpenAI's shape
    ├── InvalidRequest        400, names the parameter
    ├── Unauthorized          401
    ├── NotFound              404
    ├── TooLarge              413
    ├── Overloaded            429, with Retry-After
    ├── InternalError         500
    ├── NoWorker              503, with Retry-After
    └── Stalled               504
"""

# ruff: noqa: N818 - most of these name a state, as HTTP does

from __future__ import annotations

from typing import Any


class RouterError(Exception):
    """The base of the router's own errors."""


class ConfigurationError(RouterError):
    """The router cannot start with these settings."""


class ModelUnusable(ConfigurationError):
    """The model's files are not there, or cannot be used; names the file and the remedy."""


class KubernetesError(RouterError):
    """The Kubernetes API refused, or did not answer.

    Args:
        message: what was asked and why it failed.
        status: HTTP status of a refusal; 0 if there was none.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class KubernetesGarbage(KubernetesError):
    """The Kubernetes API answered with what cannot be understood, or with too much."""


class ApiError(RouterError):
    """An answer to a client.

    Args:
        message: what is wrong and what to do, for a person.
        param: the request's parameter that is wrong, as the client wrote it.
        code: a short machine-readable reason.
        retry_after: seconds after which the same request may succeed.
    """

    status = 500
    kind = "server_error"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        if status is not None:
            self.status = status

    def body(self) -> dict[str, Any]:
        """Return the JSON object that OpenAI's clients understand."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        """Return the response headers that belong to the error."""
        return {} if self.retry_after is None else {"retry-after": str(self.retry_after)}


class InvalidRequest(ApiError):
    """The request can never succeed as it is."""

    status = 400
    kind = "invalid_request_error"


class Unauthorized(ApiError):
    """No bearer key, or a wrong one."""

    status = 401
    kind = "authentication_error"

    def headers(self) -> dict[str, str]:
        """Return the challenge that HTTP asks for."""
        return {"www-authenticate": "Bearer"}


class NotFound(ApiError):
    """No such model or path."""

    status = 404
    kind = "invalid_request_error"


class TooLarge(ApiError):
    """The body is over the limit."""

    status = 413
    kind = "invalid_request_error"


class Overloaded(ApiError):
    """Too many requests wait already."""

    status = 429
    kind = "overloaded_error"


class InternalError(ApiError):
    """A worker or the router failed."""


class NoWorker(ApiError):
    """No worker could take the request in time."""

    status = 503
    kind = "service_unavailable"


class Stalled(ApiError):
    """A worker accepted the request and then gave no token in time."""

    status = 504
    kind = "timeout_error"
