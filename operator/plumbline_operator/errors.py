"""What can go wrong between the operator and the API server, and what follows from it."""

from __future__ import annotations


class ApiError(Exception):
    """The API server refused a request, or could not be reached (status 0). The pass is tried again later."""

    def __init__(
        self, message: str, *, status: int = 0, reason: str = "", retry_after: float | None = None, request: str = ""
    ) -> None:
        super().__init__(f"{request}: {message}" if request else message)
        self.status = status
        self.reason = reason
        """Reason of the Status object, such as AlreadyExists, Conflict, Forbidden."""
        self.retry_after = retry_after
        """Seconds that the server asks to wait."""
        self.detail = message
        """The server's own words."""


class NotFoundError(ApiError):
    """The object is not there (404)."""


class ConflictError(ApiError):
    """The object was changed by somebody else (409 Conflict), or a precondition does not hold."""


class AlreadyExistsError(ApiError):
    """The name is taken (409 AlreadyExists)."""


class ExpiredError(ApiError):
    """A continue token or resource version is too old (410)."""


class RefusedError(ApiError):
    """The object is not allowed here: invalid, over quota, against a policy (400, 403, 422). The same again is in vain
    until somebody changes something."""


class ReobserveError(Exception):
    """The world is not as it was observed: the pass ends and starts again with a fresh look. Not a failure."""


class UnsettledError(Exception):
    """The world changed under every one of several passes in a row; the next try waits."""


def api_error(
    status: int, reason: str, message: str, *, retry_after: float | None = None, request: str = ""
) -> ApiError:
    """The error for a response of the API server."""
    kind: type[ApiError] = ApiError
    if status == 404:
        kind = NotFoundError
    elif status == 409:
        kind = AlreadyExistsError if reason == "AlreadyExists" else ConflictError
    elif status == 410:
        kind = ExpiredError
    elif status in (400, 403, 422):
        kind = RefusedError
    return kind(message, status=status, reason=reason, retry_after=retry_after, request=request)
