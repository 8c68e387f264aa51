"""The reason for which a record is left out of a converted dataset."""


class Skip(Exception):
    """One record cannot be converted: `reason` is counted in the summary, `detail` describes this record's case."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail

    def __reduce__(self) -> tuple[type["Skip"], tuple[str, str]]:
        # Exceptions are pickled by their message alone otherwise.
        return Skip, (self.reason, self.detail)
