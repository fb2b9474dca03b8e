"""Routes, and what they say of themselves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Description:
    """Of a route that is documented."""

    method: str
    path: str
    endpoint: Endpoint
    request: Any
    """Type of the body; None without one."""
    response: Any
    """Type of the answer."""
    media_type: str
    """Of the answer."""


class Routes:
    """Gathers endpoints; one without a type of its answer is served, but not documented."""

    def __init__(self) -> None:
        self.served: list[Route] = []
        self.described: list[Description] = []

    def get(
        self, path: str, response: Any = None, media_type: str = "application/json"
    ) -> Callable[[Endpoint], Endpoint]:
        return lambda endpoint: self._add("GET", path, endpoint, None, response, media_type)

    def post(self, path: str, request: Any, response: Any) -> Callable[[Endpoint], Endpoint]:
        return lambda endpoint: self._add(
            "POST", path, endpoint, request, response, "application/json"
        )

    def _add(self, method: str, path: str, endpoint: Endpoint, *types: Any) -> Endpoint:
        route = Route(path, endpoint, methods=[method])
        route.methods = {method}  # by itself a GET would be a HEAD too
        self.served.append(route)
        description = Description(method, path, endpoint, *types)
        if description.response is not None:
            self.described.append(description)
        return endpoint
