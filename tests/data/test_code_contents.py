import http.server
import socket
import threading
from collections import Counter
from typing import ClassVar

import pytest

from nanotrain.config.errors import UserError
from nanotrain.data.code_contents import CodeContents, FetchSettings, file_url
from tests.data.sources import ListSource


class Faulty(http.server.BaseHTTPRequestHandler):
    """Fails on purpose, by the path: busy-N answers 503 N times, then the content."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[Counter] = Counter()
    lock = threading.Lock()
    under_way = most = 0

    def do_GET(self):
        cls = type(self)
        with cls.lock:
            cls.seen[self.path] += 1
            tries = cls.seen[self.path]
            cls.under_way += 1
            cls.most = max(cls.most, cls.under_way)
        try:
            self.answer(self.path.rsplit("/", 1)[-1], tries)
        finally:
            with cls.lock:
                cls.under_way -= 1

    def answer(self, name, tries):
        headers, status, body = {}, 200, f"content of {self.path}\n".encode()
        if name.startswith("gone"):
            status, body = 404, b"404: Not Found"
        elif name.startswith("busy") and tries <= 2:
            status, body, headers = 503, b"later", {"Retry-After": "0"}
        elif name.startswith("limit") and tries <= 1:
            status, body = 429, b"slow down"
        elif name.startswith("never"):
            status, body = 500, b"broken"
        elif name.startswith("drop") and tries <= 2:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        elif name.startswith("forbidden"):
            status, body = 403, b"no"
        elif name.startswith("latin"):
            body = b"caf\xe9"
        elif name.startswith("large"):
            body = b"x" * 5000
        elif name.startswith("empty"):
            body = b"\n"
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Be silent."""


@pytest.fixture
def server():
    Faulty.seen, Faulty.under_way, Faulty.most = Counter(), 0, 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{{repo}}/{{commit_id}}/{{rel_path}}"
    server.shutdown()
    server.server_close()


def references(*names):
    return [
        {"repo": "o/r", "commit_id": "c0", "rel_path": f"src/{name}", "language": "C", "license": "MIT"}
        for name in names
    ]


def settings(url, **changes):
    fast = {"concurrency": 4, "attempts": 4, "pause_seconds": 0.01, "timeout_seconds": 5.0, "max_bytes": 1000}
    return FetchSettings(url=url, **{**fast, **changes})


NAMES = [
    "a.c",
    "gone.c",
    "busy.c",
    "limit.c",
    "drop.c",
    "latin.c",
    "large.c",
    "empty.c",
    "forbidden.c",
    "never.c",
    "z.c",
]


def test_every_kind_of_answer_is_counted_and_the_order_and_columns_are_kept(server):
    contents = CodeContents(ListSource(references(*NAMES)), settings(server))
    rows = list(contents.records())
    assert [row["rel_path"] for row in rows] == [
        f"src/{name}" for name in ("a.c", "busy.c", "limit.c", "drop.c", "z.c")
    ]
    for row in rows:
        assert row["text"] == f"content of /o/r/c0/{row['rel_path']}\n" and (row["license"], row["language"]) == (
            "MIT",
            "C",
        )
    expected = {"references": 11, "fetched": 5, "gone": 1, "not_utf8": 1, "too_large": 1, "empty": 1, "failed": 2}
    assert contents.counts == Counter(expected)
    assert contents.retries == 2 + 1 + 2 + 3
    assert Faulty.seen["/o/r/c0/src/never.c"] == 4 and Faulty.seen["/o/r/c0/src/gone.c"] == 1


def test_requests_under_way_are_bounded(server):
    names = [f"f{n}.c" for n in range(60)]
    rows = list(CodeContents(ListSource(references(*names)), settings(server, concurrency=3)).records())
    assert len(rows) == 60 and Faulty.most <= 3


@pytest.mark.parametrize("taken", [0, 1, 3, 5])
def test_the_state_is_that_of_the_last_record_given_not_of_those_asked_for(server, taken):
    contents = CodeContents(ListSource(references(*NAMES)), settings(server))
    stream = contents.records()
    before = [next(stream)["rel_path"] for _ in range(taken)]
    state = contents.state()
    stream.close()
    after = [row["rel_path"] for row in CodeContents(ListSource(references(*NAMES)), settings(server)).records(state)]
    assert before + after == [f"src/{name}" for name in ("a.c", "busy.c", "limit.c", "drop.c", "z.c")]


def test_too_many_failures_stop_the_run_with_the_address(server):
    contents = CodeContents(
        ListSource(references("a.c", "never.c", "forbidden.c", "z.c")), settings(server, max_failed=1)
    )
    with pytest.raises(
        UserError, match=r"2 files could not be fetched, the last of them .*/forbidden.c \(status 403\)"
    ):
        list(contents.records())


def test_no_server_is_a_failure_after_all_attempts():
    contents = CodeContents(
        ListSource(references("a.c")), settings("http://127.0.0.1:9/{repo}/{commit_id}/{rel_path}", max_failed=0)
    )
    with pytest.raises(UserError, match=r"ConnectError"):
        list(contents.records())


def test_paths_are_quoted_and_a_template_must_be_whole():
    assert file_url("https://x/{repo}/{commit_id}/{rel_path}", {"repo": "a/b", "commit_id": "1", "rel_path": "d #1/ä?.c"}) == (
        "https://x/a/b/1/d%20%231/%C3%A4%3F.c"
    )  # fmt: skip
    with pytest.raises(UserError, match=r"`--url` .* must contain \{rel_path\}"):
        settings("https://x/{repo}/{commit_id}").validate()
