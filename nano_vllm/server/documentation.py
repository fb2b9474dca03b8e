"""The OpenAPI document, from the structs that requests are decoded as."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from nano_vllm.server.errors import ErrorResponse
from nano_vllm.server.routes import Routes

STATUSES = {
    400: "The request is not valid, or asks for what is not supported.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "Too many requests are waiting.",
    500: "The model failed on this request.",
    503: "Nothing is served at the moment.",
    504: "The request took too long.",
}
OF_GET = (401, 404, 503)
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_TEMPLATE = "#/components/schemas/{name}"


def document(routes: Routes) -> dict[str, Any]:
    """The OpenAPI document of the described routes."""
    described = routes.described
    types = [t for d in described for t in (d.request, d.response) if t is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, ErrorResponse], ref_template=_TEMPLATE
    )
    schema_of = dict(zip(map(str, [*types, ErrorResponse]), schemas, strict=True))
    paths: dict[str, Any] = {}
    for own in described:
        operation: dict[str, Any] = {
            "operationId": own.endpoint.__name__,
            "summary": (own.endpoint.__doc__ or "").strip(),
            "responses": {
                "200": {
                    "description": "As asked.",
                    "content": {own.media_type: {"schema": schema_of[str(own.response)]}},
                }
            },
        }
        if own.request is not None:
            body = {"application/json": {"schema": schema_of[str(own.request)]}}
            operation["requestBody"] = {"required": True, "content": body}
            if "stream" in own.request.__struct_fields__:
                content = operation["responses"]["200"]["content"]
                content["text/event-stream"] = {"schema": _EVENT}
        for status in STATUSES if own.request is not None else OF_GET:
            operation["responses"][str(status)] = {
                "description": STATUSES[status],
                "content": {"application/json": {"schema": schema_of[str(ErrorResponse)]}},
            }
        path = re.sub(r":path}", "}", own.path)
        names = re.findall(r"{(\w+)}", path)
        if names:
            operation["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                for name in names
            ]
        paths.setdefault(path, {})[own.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "nano_vllm", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
