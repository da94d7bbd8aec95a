"""A local OpenAI-compatible server that fails as real ones do, and remembers what it was asked."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

#: End-of-turn token of the tiny target.
END = 2


def answer(prompt: str) -> str:
    """What the server says, so that a row can be checked against its prompt."""
    return f"<{prompt}>"


def token_ids(text: str) -> list[int]:
    return [5 + byte % 250 for byte in text.encode()]


class ChatServer(ThreadingHTTPServer):
    """Answers chat completions.

    Attributes:
        fail: called with a handler and the prompt before an answer; true if it has failed instead.
        choice: fields that an answer's choice has in place of its own.
        with_ids: whether it knows ``return_token_ids``.
        delay: seconds an answer takes.
        models: names it serves.
        requests: every request's body.
        arrivals: when each came.
        answered: how often each prompt was answered.
        most: most requests that were under way at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fail: Callable[[_Handler, str], bool] = lambda handler, prompt: False
        self.choice: dict = {}
        self.with_ids = True
        self.delay = 0.0
        self.models = ["tiny"]
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.arrivals: list[float] = []
        self.answered: Counter[str] = Counter()
        self.most = self.under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """Clients that were killed are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body: dict | str, **headers: str) -> None:
        content = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        assert self.path == "/v1/models", self.path
        self.reply(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions", self.path
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            server.arrivals.append(time.monotonic())
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            if server.fail(self, prompt):
                return
            time.sleep(server.delay)
            text = answer(prompt)
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            if server.with_ids and body.get("return_token_ids"):
                choice["token_ids"] = [*token_ids(text), END]
            usage = {"completion_tokens": len(text) + 1}
            self.reply(200, {"choices": [choice | server.choice], "usage": usage})
            with server.lock:
                server.answered[prompt] += 1
        finally:
            with server.lock:
                server.under_way -= 1


def drop(handler: _Handler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True
    handler.connection.close()


def tear(handler: _Handler) -> None:
    """Close the connection in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    drop(handler)


def unreliable(seed: int, share: float) -> Callable[[_Handler, str], bool]:
    """Fail at ``share`` of the requests, in every way that passes."""
    chance, lock = random.Random(seed), threading.Lock()
    ways = [
        drop,
        tear,
        lambda handler: handler.reply(500, "broken"),
        lambda handler: handler.reply(503, "starting"),
        lambda handler: handler.reply(429, "busy", Retry_After="0.05"),
        lambda handler: handler.reply(200, "no JSON"),
        lambda handler: handler.reply(200, {"choices": []}),
        lambda handler: time.sleep(5),  # hangs: the client's timeout is shorter
    ]

    def fail(handler: _Handler, prompt: str) -> bool:
        with lock:
            way = chance.choice(ways) if chance.random() < share else None
        if way is not None:
            way(handler)
        return way is not None

    return fail


@contextmanager
def running() -> Iterator[ChatServer]:
    """A server on a free port of this machine."""
    with ChatServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
