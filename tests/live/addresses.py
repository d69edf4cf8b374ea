"""Where a server under test listens."""

from __future__ import annotations

from dataclasses import dataclass

import tritonclient.grpc as grpcclient

from trident_llm.launch.ports import Ports


@dataclass(frozen=True)
class Addresses:
    ports: Ports

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.ports.grpc}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.http}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.metrics}/metrics"

    def grpc_client(self) -> grpcclient.InferenceServerClient:
        return grpcclient.InferenceServerClient(self.grpc_url)
