"""Contents of source files that a data set only names, fetched by (repo, commit_id, rel_path) from a URL template.

A bounded number of requests is under way at a time and results keep the order of the references, so the output does not
depend on which answer comes first. A file that is gone (404, 410, 451) is counted; a server that is busy or broken
(408, 429, 5xx, no connection) is asked again with growing pauses; what still fails is counted, and too much of it stops
the run.
"""

import random
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import httpx

from nanotrain.config.errors import UserError
from nanotrain.data.record_shards import Record, RecordSource, State

RAW_GITHUB = "https://raw.githubusercontent.com/{repo}/{commit_id}/{rel_path}"
_GONE = frozenset({404, 410, 451})
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class FetchSettings:
    """How contents are fetched.

    Attributes:
        url: template with {repo}, {commit_id} and {rel_path}.
        concurrency: requests under way at a time.
        attempts: tries of one file before it counts as failed.
        pause_seconds: before the second try; doubles with each further one, give or take a half.
        timeout_seconds: of one request.
        max_bytes: larger files are counted and left out.
        max_failed: files that may fail for good before the run stops.
    """

    url: str = RAW_GITHUB
    concurrency: int = 16
    attempts: int = 6
    pause_seconds: float = 1.0
    timeout_seconds: float = 30.0
    max_bytes: int = 1_000_000
    max_failed: int = 100

    def validate(self) -> None:
        """Raise UserError for values that cannot work."""
        for part in ("{repo}", "{commit_id}", "{rel_path}"):
            if part not in self.url:
                raise UserError(f"`--url` ({self.url}) must contain {part}; the default is {RAW_GITHUB}.")
        for name in ("concurrency", "attempts", "max_bytes"):
            if self.__dict__[name] < 1:
                raise UserError(f"`--{name.replace('_', '-')}` ({self.__dict__[name]}) must be at least 1.")
        if self.pause_seconds < 0 or self.timeout_seconds <= 0 or self.max_failed < 0:
            raise UserError("`--pause-seconds` and `--max-failed` must not be negative, `--timeout-seconds` above 0.")


def file_url(template: str, reference: Record) -> str:
    """Return the address of a file; what a path may hold and an address may not is quoted."""
    parts = {name: quote(str(reference[name]), safe="/") for name in ("repo", "commit_id", "rel_path")}
    return template.format(**parts)


class CodeContents:
    """References in, references with `text` out; a source of records for `record_shards.write_shards`.

    Args:
        references: records with repo, commit_id and rel_path; all their columns are kept.
        settings: how to fetch.
    """

    def __init__(self, references: RecordSource, settings: FetchSettings) -> None:
        settings.validate()
        self._references, self._settings = references, settings
        self.counts: Counter[str] = Counter()
        """references, fetched, gone, too_large, not_utf8, empty, failed."""
        self.retries = 0
        """Requests made again: of this start only, and not part of what is written."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._state: State = {}

    def state(self) -> State:
        """Return the state of the references after the last record that was given, and not of those asked for ahead."""
        return self._state

    def records(self, state: State | None = None) -> Iterator[Record]:
        """Yield the references whose content was had, in their order, with the content as `text`.

        Raises:
            UserError: more than `max_failed` files failed for good.
        """
        limits = httpx.Limits(max_connections=self._settings.concurrency)
        self._state = state or {}
        with (
            httpx.Client(timeout=self._settings.timeout_seconds, follow_redirects=True, limits=limits) as client,
            ThreadPoolExecutor(self._settings.concurrency) as pool,
        ):
            pending: deque[tuple[Record, State, Future[tuple[str, str]]]] = deque()
            references = self._references.records(state or None)
            try:
                exhausted = False
                while pending or not exhausted:
                    while not exhausted and len(pending) < 2 * self._settings.concurrency:
                        reference = next(references, None)
                        if reference is None:
                            exhausted = True
                            break
                        pending.append(
                            (reference, self._references.state(), pool.submit(self._fetch, client, reference))
                        )
                    if not pending:
                        break
                    reference, after, answer = pending.popleft()
                    outcome, text = answer.result()
                    self._state = after
                    self.counts.update({"references": 1, outcome: 1})
                    self._refuse_failures(reference, text if outcome == "failed" else "")
                    if outcome == "fetched":
                        yield reference | {"text": text}
            finally:
                self._stopped.set()
                for _, _, answer in pending:
                    answer.cancel()

    def _refuse_failures(self, reference: Record, reason: str) -> None:
        if self.counts["failed"] > self._settings.max_failed:
            raise UserError(
                f"{self.counts['failed']} files could not be fetched, the last of them"
                f" {file_url(self._settings.url, reference)} ({reason}); check the network or the server, then run the same"
                " command again, or raise `--max-failed`."
            )

    def _fetch(self, client: httpx.Client, reference: Record) -> tuple[str, str]:
        """Return (outcome, text or reason)."""
        url, reason = file_url(self._settings.url, reference), "no attempt"
        draw = random.Random(url)
        for attempt in range(self._settings.attempts):
            if attempt:
                with self._lock:
                    self.retries += 1
            wait = self._settings.pause_seconds * 2**attempt * (0.5 + draw.random())
            try:
                outcome, text, asked = self._request(client, url)
            except httpx.TransportError as error:
                outcome, text, asked = "again", type(error).__name__, None
            if outcome != "again":
                return outcome, text
            reason = text
            if attempt + 1 < self._settings.attempts and self._stopped.wait(
                min(asked if asked is not None else wait, _LONGEST_PAUSE_SECONDS)
            ):
                break
        return "failed", reason

    def _request(self, client: httpx.Client, url: str) -> tuple[str, str, float | None]:
        """Return (outcome, text or reason, pause that the server asks for in seconds)."""
        with client.stream("GET", url) as response:
            if response.status_code in _GONE:
                return "gone", "", None
            if response.status_code in _RETRIED:
                after = response.headers.get("Retry-After", "")
                return "again", f"status {response.status_code}", float(after) if after.isdigit() else None
            if response.status_code != 200:
                return "failed", f"status {response.status_code}", None
            body = bytearray()
            for part in response.iter_bytes():
                body += part
                if len(body) > self._settings.max_bytes:
                    return "too_large", "", None
        return _decoded(bytes(body))


def _decoded(body: bytes) -> tuple[str, str, None]:
    if not body.strip():
        return "empty", "", None
    try:
        return "fetched", body.decode("utf-8"), None
    except UnicodeDecodeError:
        return "not_utf8", "", None
