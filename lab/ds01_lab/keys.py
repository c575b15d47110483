"""The lab's own SSH key: made once a checkout, never leaves it but as authorized_keys on lab hosts."""

from pathlib import Path

from .paths import BUILD
from .shell import run

PRIVATE = BUILD / "id_ed25519"


def public_key() -> str:
    """The public half, the pair made first where there is none."""
    public = PRIVATE.with_suffix(".pub")
    if not public.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        PRIVATE.unlink(missing_ok=True)
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "ds01-lab", "-f", PRIVATE])
    return public.read_text()


def known_hosts(prefix: str) -> Path:
    """Where the host keys of a prefix's hosts are pinned."""
    return BUILD / prefix / "known_hosts"
