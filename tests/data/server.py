"""A server of files that can fail as servers do, and small archives in the formats of the published ones."""

import io
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TRAINING = [f"news.en-{i:05d}-of-00100" for i in range(1, 100)]
HELD_OUT = [f"news.en.heldout-{i:05d}-of-00050" for i in range(50)]


def zipped(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def wikitext(contents):
    """The archive of WikiText-103, of one text for each split."""
    return zipped({f"wikitext-103/wiki.{split}.tokens": content for split, content in contents.items()})


def billion(shards):
    """The archive of the One Billion Word Benchmark, its shards in an order of its own, with other files among them."""
    top = "1-billion-word-language-modeling-benchmark-r13output"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:

        def add(name, content):
            info = tarfile.TarInfo(f"{top}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        add("README", b"about it")
        add("heldout-monolingual.tokenized.shuffled/news.en-00000-of-00100", b"all that is held out\n")
        for shard in shards:
            folder = "heldout" if "heldout" in shard else "training"
            add(f"{folder}-monolingual.tokenized.shuffled/{shard}", shards[shard])
    return buffer.getvalue()


class Server:
    """`files` by name; `ranges` and `etag` as real servers have them or not.

    `stops` and `refusals` are used up, one by each request: after how many bytes to close, or stall, the connection, and
    which status to answer with. `requests` has the Range and If-Range of each request, `sent` the bytes of each answer.
    """

    def __init__(self):
        self.files, self.ranges, self.etag = {}, True, '"v1"'
        self.stops, self.refusals, self.stall = [], [], 0.0
        self.requests, self.sent = [], []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": self}))
        self.port = self._server.server_address[1]

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/some/{name}"


class _Handler(BaseHTTPRequestHandler):
    served: Server

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        served = self.served
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        served.requests.append((wanted, condition))
        content = served.files.get(self.path.rsplit("/", 1)[1])
        if served.refusals or content is None:
            self.send_error(served.refusals.pop(0) if served.refusals else 404)
            return
        start, status = 0, 200
        if wanted and served.ranges and condition in (None, served.etag):
            start, status = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
        if status == 206 and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if served.etag:
            self.send_header("ETag", served.etag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if served.stops:
            body = body[: served.stops.pop(0)]
            self.close_connection = True
        served.sent.append(len(body))
        self.wfile.write(body)
        self.wfile.flush()
        if len(body) < len(content) - start:
            time.sleep(served.stall)
