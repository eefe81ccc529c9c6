"""A source of records in memory, with the state that a stream on disk would have; loaded by path."""


class ListSource:
    """Records of a list; `stop_at` makes it fail after so many records, as a kill would."""

    schema = None

    def __init__(self, records, stop_at=None):
        self._records, self._stop_at, self._at = records, stop_at, 0

    def state(self):
        return {"at": self._at}

    def records(self, state=None):
        self._at = state["at"] if state else 0
        while self._at < len(self._records):
            if self._at == self._stop_at:
                raise KeyboardInterrupt
            self._at += 1
            yield self._records[self._at - 1]
