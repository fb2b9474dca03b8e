"""Requests off the wire: bodies of bounded size and number of parts.

Their depth is bounded by the types they are decoded as: no request nests deeper than a few levels.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

import msgspec

from nano_vllm.server.errors import ApiError, invalid

MAX_BODY = 10 * 2**20
MAX_COMMAS = 2**18
MAX_BRACKETS = 2**17
"""With the commas they bound the time that decoding holds up everybody else. Those in texts count
too."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
T = TypeVar("T")
_PLACE = re.compile(r"(?s)(.*) - at `\$\.?([^.\[`]*)[^`]*`")
_FIELD = re.compile(r"Object (?:contains unknown|missing required) field `(.*)`")


class Disconnected(Exception):
    """The client has gone."""


async def read_body(headers: Any, receive: Receive, timeout: float) -> bytes:
    """The whole body.

    Args:
        headers: of the request.
        receive: ASGI's.
        timeout: seconds that the client has to send it.
    """
    length = headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length[:20]) > MAX_BODY):
        raise _too_large()
    # Nor none: with another, or none, a page of any site may have a browser send it.
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "the body must be application/json")
    try:
        return await asyncio.wait_for(_receive_all(receive), timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {timeout:g} s") from None


async def _receive_all(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise _too_large()
        more = message.get("more_body", False)
    return b"".join(parts)


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request of the decoder's type; ApiError names the field at fault."""
    if body.count(b",") > MAX_COMMAS:
        raise invalid(f"the body must have at most {MAX_COMMAS} commas")
    if body.count(b"[") + body.count(b"{") > MAX_BRACKETS:
        raise invalid(f"the body must have at most {MAX_BRACKETS} opening brackets")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise invalid("the body is not valid JSON in UTF-8") from None


def _explained(message: str) -> ApiError:
    unknown = _FIELD.match(message)
    place = _PLACE.fullmatch(message)
    if unknown and not place:
        verb = "is missing" if "missing" in message else "is not known"
        return invalid(f"the field {unknown[1]!r} {verb}", unknown[1])
    if place is None:
        return invalid(f"the body: {message}")
    problem = place[1].replace("`", "")
    field = place[2]
    if problem.startswith(("Expected null", "Expected array of length <= 0", "Invalid enum")):
        return invalid(f"{field}: this value is not supported ({problem})", field, "unsupported")
    return invalid(f"{field}: {problem}", field)


def _too_large() -> ApiError:
    return ApiError(413, f"the body must have at most {MAX_BODY} bytes")
