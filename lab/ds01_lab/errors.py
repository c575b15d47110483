"""What the lab says when it cannot go on."""


class LabError(Exception):
    """What happened, and the next step for the person who reads it."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step
