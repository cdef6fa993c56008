"""How clients connect."""

from __future__ import annotations

import json

from quire.serving import CHANNEL_OPTIONS

# A repeat is harmless until the first message of the answer came, and gRPC repeats only until then: a router that
# answers UNAVAILABLE took nothing on, and one that died lost the request with it.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": "quire.router.v1.RouterService"},
                {"service": "quire.memory.v1.InspectionService"},
            ],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
        # Whoever watches is to know at once that the service is away.
        {"name": [{"service": "quire.memory.v1.InspectionService", "method": "Watch"}]},
    ],
}
OPTIONS = (
    *CHANNEL_OPTIONS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # Retries are of little use if the channel itself waits longer to connect again.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

DEFAULT_TIMEOUT_S = 300.0
SHORT_TIMEOUT_S = 10.0
