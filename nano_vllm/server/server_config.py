"""The server's own options, beside the engine's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nano_vllm.config import check_types

KEY_VARIABLE = "NANO_VLLM_API_KEY"
"""Of the environment, where there is no api_key."""


@dataclass(frozen=True)
class ServerConfig:
    """Where to listen, and what to bear.

    Raises ValueError, naming the value and what is allowed, for anything out of range.
    """

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all."""
    port: int = 8000
    """TCP port; 0 for any that is free."""
    data_parallel_size: int = 1
    """Replicas of the model behind this port, each with its own process, KV cache and, times
    tensor_parallel_size and pipeline_parallel_size, GPUs.
    """
    served_model_name: str | None = None
    """The model's name in the API, if not as it is given here."""
    api_key: str | None = None
    """Every route but /health then wants `Authorization: Bearer KEY`. Better given as the
    environment's NANO_VLLM_API_KEY, as others see a command line.
    """
    ssl_certfile: str | None = None
    """Certificate, for HTTPS."""
    ssl_keyfile: str | None = None
    """The certificate's key."""
    ssl_keyfile_password: str | None = None
    """Of the key."""
    ssl_ca_certs: str | None = None
    """Whom client certificates are to be signed by."""
    max_queue: int = 256
    """Prompts that may wait beyond max_num_seqs of each replica; more are refused with 429."""
    request_timeout: float = 600.0
    """Seconds that a request may take."""
    read_timeout: float = 30.0
    """Seconds in which a client has to send its request, and to take what was sent to it."""
    step_timeout: float = 60.0
    """Seconds without a sign of life of the engine, after which /health turns 503."""
    drain_timeout: float = 30.0
    """Seconds that requests under way have to end in, after SIGTERM."""
    log_format: str = "text"
    """text or json, a line each request."""
    access_log: bool = True
    """Whether there is such a line."""

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be an integer in [0, 65535], got {self.port!r}")
        if self.data_parallel_size < 1:
            raise ValueError(
                f"data_parallel_size must be an integer of at least 1, got "
                f"{self.data_parallel_size!r}"
            )
        if self.max_queue < 0:
            raise ValueError(f"max_queue must be an integer of at least 0, got {self.max_queue!r}")
        for name in ("request_timeout", "read_timeout", "step_timeout", "drain_timeout"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        if self.log_format not in ("text", "json"):
            raise ValueError(f"log_format must be one of text, json, got {self.log_format!r}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.strip()):
            raise ValueError("api_key must be printable ASCII, and not empty")
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ValueError("ssl_keyfile needs ssl_certfile")
