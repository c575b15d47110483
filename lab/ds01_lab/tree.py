"""Archives made in memory: what the lab puts into hosts, and its test images."""

import io
import tarfile


class Tree:
    """A tar in memory whose bytes depend on nothing but what is put in."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 closed by content()

    def file(self, path: str, content: bytes | str, mode: int = 0o644) -> None:
        """A regular file of root's."""
        data = content.encode() if isinstance(content, str) else content
        entry = tarfile.TarInfo(path)
        entry.size, entry.mode = len(data), mode
        self._tar.addfile(entry, io.BytesIO(data))

    def folder(self, path: str, mode: int, owner: int = 0) -> None:
        """A directory."""
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
        self._tar.addfile(entry)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        entry = tarfile.TarInfo(path)
        entry.type, entry.mode, entry.linkname = tarfile.SYMTYPE, 0o777, target
        self._tar.addfile(entry)

    def content(self) -> bytes:
        """The finished archive; nothing can be added afterwards."""
        self._tar.close()
        return self._buffer.getvalue()
