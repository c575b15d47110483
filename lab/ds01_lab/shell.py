"""Commands of this machine: run, run as root, and progress lines."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import LabError


def say(text: str) -> None:
    """One progress line, on stderr so that a command's own output stays clean."""
    sys.stderr.write(f"== {text}\n")
    sys.stderr.flush()


def as_root(argv: Sequence[str | Path]) -> list[str]:
    """The same command, through sudo where this process is not root."""
    words = [str(word) for word in argv]
    if os.geteuid() == 0:
        return words
    if shutil.which("sudo") is None:
        raise LabError(f"{words[0]} needs root, and there is no sudo", "run the same command as root")
    return ["sudo", *words]


def run(
    argv: Sequence[str | Path],
    timeout: float = 60,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
) -> str:
    """Run a command to its end and return its output; a failure carries the last lines it said."""
    words = [str(word) for word in argv]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            input=stdin,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"{words[0]} is not installed", "install it and run the same command again") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"no end after {timeout:.0f} s: {' '.join(words)}", "run it by hand to see why") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise LabError(f"failed with {done.returncode}: {' '.join(words)}\n{tail}", "see the lines above")
    return done.stdout


def own_directory(path: Path) -> Path:
    """A directory of the calling user's, made as root where its parent is root's."""
    if not path.is_dir():
        run(as_root(["install", "-d", "-m", "0755", "-o", str(os.getuid()), "-g", str(os.getgid()), path]))
    return path
