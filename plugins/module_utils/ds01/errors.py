"""Errors that reach a person: a reason code for programs, one sentence, and the next step."""

from __future__ import annotations

EXIT_OK = 0
EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_INTERRUPTED = 130

_EXIT_CODES = {
    "invalid_input": EXIT_USAGE,
    "config_invalid": EXIT_USAGE,
    "unknown_user": EXIT_USAGE,
    "driver_unavailable": EXIT_UNAVAILABLE,
    "engine_unavailable": EXIT_UNAVAILABLE,
    "ledger_unavailable": EXIT_UNAVAILABLE,
    "ledger_damaged": EXIT_UNAVAILABLE,
    "lock_timeout": EXIT_UNAVAILABLE,
    "deadline_passed": EXIT_UNAVAILABLE,
    "policy_state_damaged": EXIT_UNAVAILABLE,
    "permission_denied": EXIT_UNAVAILABLE,
    "library_missing": EXIT_UNAVAILABLE,
}


def exit_code(reason: str) -> int:
    """The process exit code for a reason: 1 refused, 2 usage or config, 3 something is unavailable."""
    return _EXIT_CODES.get(reason, EXIT_REFUSED)


class Ds01Error(Exception):
    """Something that was asked for cannot be done, and nothing was changed.

    `reason` is one of the reason codes (design: "Reason codes"), `hint` says what would help,
    `details` holds further keys for `--json` and module results.
    """

    def __init__(self, reason: str, message: str, hint: str = "", **details: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    @property
    def exit_code(self) -> int:
        return exit_code(self.reason)


def invalid_input(message: str, hint: str = "") -> Ds01Error:
    return Ds01Error("invalid_input", message, hint)
