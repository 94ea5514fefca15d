"""Object stores on this machine: moto's S3 and gcp-storage-emulator, slow and failing where a test asks for it."""

import logging
import os
import threading
import time
from contextlib import contextmanager
from functools import cache, partial
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from io import BytesIO
from urllib.parse import unquote

import pytest

BUCKET = "bucket"

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "FSSPEC_GCS_TOKEN": "anon",
    # gcsfs asks over gRPC what sort of bucket it is, which no emulator answers.
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "NO_PROXY": "127.0.0.1,localhost",
}


class Trouble:
    """What a server does to requests: waits, and answers some of them with an error.

    Attributes:
        latency: seconds that each request waits.
        failing: share of the requests that get `status`.
        status: of an answer that fails.
        matching: only requests whose method and path hold this text.
        requests: method and path of all requests since the last `reset`.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.reset()

    def reset(self, latency=0.0, failing=0.0, status=503, matching=""):
        self.latency, self.failing, self.status, self.matching = latency, failing, status, matching
        self.requests, self.failed, self.due = [], 0, 0.0

    def meet(self, request):
        """Wait; the status to answer with, or None."""
        with self.lock:
            self.requests.append(request)
            self.due += self.failing if self.matching in request else 0.0
            fails = self.due >= 1.0
            self.due -= fails
            self.failed += fails
        time.sleep(self.latency)
        return self.status if fails else None


TROUBLE = Trouble()

CODES = {503: "SlowDown", 403: "AccessDenied", 500: "InternalError"}


def s3_server():
    """An S3 server in a thread; its port."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    inner = DomainDispatcherApplication(create_backend_app)

    def app(environ, start_response):
        status = TROUBLE.meet(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if status is None:
            return inner(environ, start_response)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        code = CODES[status]
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Please wait ({code})</Message></Error>".encode()
        )
        start_response(f"{status} {code}", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def gs_server():
    """A Google Cloud Storage server in a thread; its port."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound

    class Router(emulator.Router):
        """Makes trouble, and keeps ifGenerationMatch, of which the emulator does not know."""

        def handle(self, method):
            # Read before the lock: who holds it waits for nobody.
            size = int(self._request_handler.headers.get("Content-Length") or 0)
            self._request_handler.rfile = BytesIO(self._request_handler.rfile.read(size))
            request = emulator.Request(self._request_handler, method)
            status = TROUBLE.meet(f"{method} {unquote(request.path)}")
            with lock:
                if status is None and self._matches(request):
                    return super().handle(method)
            response = emulator.Response(self._request_handler)
            response.status = HTTPStatus(status or 412)
            response.json({"error": {"code": response.status, "message": response.status.phrase}})
            return response.close()

        def _matches(self, request):
            wanted = request.query.get("ifGenerationMatch")
            return not wanted or generation(request) == wanted[0]

    class Response(emulator.Response):
        """Says which generation was read, as the real store does."""

        def close(self):
            found = generation(emulator.Request(self._handler, "GET"))
            if found != "0":
                self["x-goog-generation"] = found
            super().close()

    def generation(request):
        bucket, _, key = unquote(request.path).partition("/b/")[2].partition("/o")
        key = key.removeprefix("/") or request.query.get("name", [""])[0]
        try:
            return storage.get_file_obj(bucket, key)["generation"]
        except NotFound:
            return "0"

    emulator.Response = Response
    emulator.Router = Router
    lock, storage = threading.RLock(), emulator.Storage(use_memory_fs=True)
    emulator.buckets.create_bucket(BUCKET, storage)
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(emulator.RequestHandler, storage))
    emulator.RequestHandler.timeout = 10
    server.handle_error = lambda *_: None  # a client that closes early
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


@cache
def _servers():
    """One of each serves all tests of a process, in whatever files their fixtures are named."""
    from epigone.storage.places import filesystem

    s3, gs = s3_server(), gs_server()
    settings = SETTINGS | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{gs}",
        "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{gs}",
    }
    os.environ.update(settings)
    filesystem("s3").call_s3("create_bucket", Bucket=BUCKET)
    return settings


@pytest.fixture(scope="session")
def stores():
    """Settings with which this process and its children find both servers."""
    return _servers()


@pytest.fixture(params=["s3", "gs"])
def folder(request, stores):
    """A new place in a bucket, of each store."""
    yield from _new(request.param, request.node.name)


@pytest.fixture
def s3_folder(request, stores):
    """A new place in a bucket of S3."""
    yield from _new("s3", request.node.name)


def _new(scheme, name):
    from epigone.storage.places import place

    TROUBLE.reset()
    yield place(f"{scheme}://{BUCKET}/{abs(hash(name))}-{time.monotonic_ns()}")
    TROUBLE.reset()


@contextmanager
def trouble(**how):
    """Requests meet this trouble."""
    TROUBLE.reset(**how)
    try:
        yield TROUBLE
    finally:
        TROUBLE.latency = TROUBLE.failing = 0.0
