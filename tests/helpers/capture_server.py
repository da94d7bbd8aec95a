"""A capture server over a Hugging Face target, for the tests of server-streamed training.

It answers what SpecForge's producer asks of a patched SGLang server: ``POST /generate`` with token
ids and a ``spec_capture`` request each runs the target once, writes the features into a Mooncake
store, one object per tensor, and returns their shapes. Mooncake is found through the ``MOONCAKE_*``
environment variables. Every request's artifacts are printed, so that a test can see what was asked.

    python capture_server.py TARGET PORT LAYER [LAYER ...]
"""

from __future__ import annotations

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from mooncake.store import MooncakeDistributedStore, ReplicateConfig
from transformers import AutoModelForCausalLM

SEGMENT = 64 << 20


class Store:
    """The server's share of a Mooncake store: it owns the memory that features are kept in."""

    def __init__(self) -> None:
        self.client = MooncakeDistributedStore()
        status = self.client.setup(
            local_hostname="127.0.0.1",
            metadata_server=os.environ["MOONCAKE_METADATA_SERVER"],
            master_server_addr=os.environ["MOONCAKE_MASTER_SERVER_ADDR"],
            global_segment_size=SEGMENT,
            local_buffer_size=SEGMENT,
            protocol="tcp",
            rdma_devices="",
        )
        if status:
            raise RuntimeError(f"mooncake setup failed with status {status}")
        self.pinned = ReplicateConfig()
        # SpecForge alone frees features: none may be evicted before the trainer has read it.
        self.pinned.with_hard_pin = True

    def write(self, key: str, tensor: torch.Tensor) -> None:
        tensor = tensor.contiguous()
        size = tensor.numel() * tensor.element_size()
        self.client.register_buffer(tensor.data_ptr(), size)
        try:
            status = self.client.put_from(key, tensor.data_ptr(), size, self.pinned)
        finally:
            self.client.unregister_buffer(tensor.data_ptr())
        if status < 0:
            raise RuntimeError(f"put_from of {key} failed with status {status}")

    def remove(self, key: str) -> None:
        self.client.remove(key)


class Capture:
    """Runs the target and stores what a ``spec_capture`` request asks for."""

    def __init__(self, target: str, layers: list[int]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        self.layers = layers
        self.store = Store()

    @torch.inference_mode()
    def __call__(self, input_ids: list[int], request: dict) -> dict:
        hidden = self.model(torch.tensor([input_ids]), output_hidden_states=True).hidden_states
        artifacts = {
            # hidden[0] is the embedding, so layer k's output is hidden[k + 1]; the last is normed.
            "aux": torch.cat([hidden[layer + 1] for layer in self.layers], -1),
            "last_hidden": hidden[-1],
        }
        print("captured", *sorted(request["features"]), flush=True)
        tensors = {name: artifacts[kind].clone() for kind, name in request["features"].items()}
        for item in request["passthrough"]:
            values = torch.tensor(item["data"], dtype=getattr(torch, item["dtype"]))
            tensors[item["name"]] = values.reshape(item["shape"])
        prefix = f"{request['store_id']}/{request['sample_id']}/g{request['gen']}"
        for name, tensor in tensors.items():
            if request["replace"]:
                self.store.remove(f"{prefix}/{name}")
            self.store.write(f"{prefix}/{name}", tensor)
        return {
            **{name: request[name] for name in ("sample_id", "store_id", "gen")},
            "aux_layer_ids": self.layers,
            "features": {
                name: {
                    "shape": list(tensor.shape),
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                }
                for name, tensor in tensors.items()
            },
        }


def serve(target: str, port: int, layers: list[int]) -> None:
    """Serve until the process is stopped."""
    capture = Capture(target, layers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            pairs = zip(body["input_ids"], body["spec_capture"], strict=True)
            self._answer([{"meta_info": {"spec_capture": capture(*pair)}} for pair in pairs])

        def _answer(self, content: object) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            """Say nothing of single requests."""

    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), [int(layer) for layer in sys.argv[3:]])
