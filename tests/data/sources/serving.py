"""A web server of shards that fails as one asks it to."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOR_EVER = 10**9


@dataclass
class ShardServer:
    """Serves the files of a folder, whole or in ranges.

    Attributes:
        pattern: of the shards; for whoever opens them.
        missing: how many more requests for a file are answered by 404.
        breaks: byte of a file after which the connection breaks off, and how many more times.
        bytes_sent: of each file.
    """

    folder: Path
    address: str = ""
    pattern: str = ""
    missing: Counter = field(default_factory=Counter)
    breaks: dict[str, tuple[int, int]] = field(default_factory=dict)
    bytes_sent: Counter = field(default_factory=Counter)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, server: ShardServer, *args):
        self.shards = server
        super().__init__(*args)

    def log_message(self, format, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool):
        name = self.path.lstrip("/")
        path = self.shards.folder / name
        if self.shards.missing[name] > 0 or not path.is_file():
            self.shards.missing[name] -= with_body
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        self.end_headers()
        if with_body:
            end, times = self.shards.breaks.get(name, (stop, 0))
            if end < stop and times > 0:
                self.shards.breaks[name] = (end, times - 1)
                self.wfile.write(content[start : max(start, end)])
                self.close_connection = True
            else:
                self.wfile.write(content[start:stop])
                self.shards.bytes_sent[name] += stop - start


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    shards = ShardServer(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, shards))
    server.daemon_threads = True
    shards.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield shards
    finally:
        server.shutdown()
        server.server_close()
