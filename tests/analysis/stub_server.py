"""An OpenAI-compatible server for tests, in a thread: it answers as it is told and remembers what it was asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server sends back."""

    content: str | None = "w3 w4"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    usage: dict[str, int] | None = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 5})
    error: dict[str, Any] | None = None
    raw: str | None = None
    """Sent instead, as it is."""
    delay: float = 0.0


class Stub:
    """The requests that came in, and how to answer the next one."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self.url = ""
        self._now = 0
        self._lock = threading.Lock()

    def take(self, path: str, key: str | None, body: dict[str, Any]) -> Reply:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.paths.append(path)
            self.keys.append(key)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            reply = self.answer(body, number)
            time.sleep(reply.delay)
            return reply
        finally:
            with self._lock:
                self._now -= 1


def asked(body: dict[str, Any]) -> str:
    """The last message, or the prompt, of a request."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Stub]:
    """Serve on a free port of this machine until the block ends."""
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(Reply(raw=json.dumps({"object": "list", "data": [{"id": "served", "object": "model"}]})), {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(stub.take(self.path, self.headers.get("Authorization"), body), body)

        def _send(self, reply: Reply, body: dict[str, Any]) -> None:
            content = (reply.raw if reply.raw is not None else json.dumps(_data(reply, body))).encode()
            try:
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:
                pass  # The client no longer waits.

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _data(reply: Reply, body: dict[str, Any]) -> dict[str, Any]:
    if reply.status >= 400:
        return {"error": reply.error or {"message": f"status {reply.status}", "type": "stub"}}
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    if "messages" in body:
        choice["message"] = {"role": "assistant", "content": reply.content}
    else:
        choice["text"] = reply.content
    data = {"id": "1", "object": "completion", "created": 0, "model": "served", "choices": [choice]}
    return data if reply.usage is None else {**data, "usage": reply.usage}
