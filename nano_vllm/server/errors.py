"""Errors as the OpenAI API gives them."""

from __future__ import annotations

import msgspec


class ErrorBody(msgspec.Struct):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    """The request's field at fault."""
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """The answer to a request that is not served."""

    error: ErrorBody


TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}
RETRY_STATUSES = (429, 503)


class ApiError(Exception):
    """Becomes an error response.

    Args:
        status: of HTTP.
        message: one line, without paths, addresses or internals.
        param: the request's field at fault.
        code: for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code

    @property
    def response(self) -> ErrorResponse:
        kind = TYPES.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return ErrorResponse(ErrorBody(self.message, kind, self.param, self.code))

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": "1"} if self.status in RETRY_STATUSES else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake."""
    return ApiError(400, message, param, code)
