#!/usr/bin/python
"""Ansible module: many small files below one directory of a host, in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ds01_tree
short_description: Keep many small files below one directory
version_added: "0.1.0"
description:
  - Copying a directory with M(ansible.builtin.copy) asks the host twice for each file, also when nothing is new. This
    module takes all files in one call, and may check them together before any of them replaces an old one.
author:
  - The DS01 authors (@ds01)
options:
  path:
    description:
      - The directory on the host. It is made, and so are the directories below it that O(files) names.
    type: path
    required: true
  files:
    description:
      - Path below O(path) to the file's text.
    type: dict
    required: true
  mode:
    description:
      - The mode of the files.
    type: str
    default: "0644"
  directory_mode:
    description:
      - The mode of the directories.
    type: str
    default: "0755"
  purge:
    description:
      - Patterns below O(path), such as C(*.py) or C(*.d/50-ds01.conf). Files that match one and are not in O(files) are
        removed, and with the last file its directory.
    type: list
    elements: str
    default: []
  validate:
    description:
      - A command that checks the files before they replace old ones; V(%s) stands for a directory that holds all of
        them. Where it fails, nothing is changed and the module fails with what the command said.
      - Not run in check mode, or when nothing would change.
    type: str
attributes:
  check_mode:
    description: Can run in check mode and say what would change, without writing anything.
    support: full
  diff_mode:
    description: Shows what changed, or would.
    support: full
  idempotent:
    description: A second run with the same options changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: Install a package
  ds01_tree:
    path: /opt/ds01/lib/ds01
    files:
      __init__.py: ""
      names.py: "{{ lookup('ansible.builtin.file', 'names.py', rstrip=false) }}"
    purge: ["*.py"]
"""

RETURN = r"""
written:
  description: Files that were written or given another mode, below O(path).
  returned: always
  type: list
  elements: str
removed:
  description: Files that were removed, below O(path).
  returned: always
  type: list
  elements: str
"""

import contextlib
import shlex
import tempfile
from pathlib import Path, PurePosixPath

from ansible.module_utils.basic import AnsibleModule


class Tree:
    """The wanted files, and how the host differs."""

    def __init__(self, module: AnsibleModule) -> None:
        params = module.params
        self.module = module
        self.root = Path(params["path"])
        self.files = {name: str(text).encode() for name, text in params["files"].items()}
        self.mode = int(params["mode"], 8)
        self.directory_mode = int(params["directory_mode"], 8)
        # Parents first: what is missing above the root, the root, then every directory on the way to a file.
        above = [parent for parent in reversed(self.root.parents) if not parent.exists()]
        below = {parent for name in self.files for parent in PurePosixPath(name).parents}
        self.directories = above + [self.root / parent for parent in sorted(below | {PurePosixPath(".")})]
        matching = {path for pattern in params["purge"] for path in self.root.glob(pattern)}
        self.stale = sorted(str(path.relative_to(self.root)) for path in matching)
        self.stale = [name for name in self.stale if name not in self.files]
        self.outdated = [name for name in self.files if self._state(self.root / name) != (self.files[name], self.mode)]
        self.loose = [path for path in self.directories if not self._is_directory(path)]

    def changed(self) -> bool:
        return bool(self.outdated or self.stale or self.loose)

    def diff(self) -> list[dict[str, str]]:
        """Texts before and after; a file whose mode alone differs shows that."""
        entries = [self._entry(name, self.files[name], self.mode) for name in self.outdated]
        return entries + [self._entry(name, b"", None) for name in self.stale]

    def check(self, command: str) -> None:
        """Run the check on the whole new tree; fail with its own words."""
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as staging:
            for name, content in self.files.items():
                path = Path(staging, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            rc, out, err = self.module.run_command([part.replace("%s", staging) for part in shlex.split(command)])
        if rc != 0:
            said = (err.strip() or out.strip()).replace(staging, str(self.root))
            self.module.fail_json(msg=f"{said} Nothing in {self.root} was changed.", rc=rc)

    def write(self) -> None:
        for directory in self.directories:
            directory.mkdir(exist_ok=True)
            self.module.set_mode_if_different(str(directory), self.directory_mode, False)
        for name in self.outdated:
            # Beside nothing that reads the directory, then moved into place: nobody sees half a file.
            with tempfile.NamedTemporaryFile(dir=self.module.tmpdir, delete=False) as new:
                new.write(self.files[name])
            target = self.root / name
            self.module.atomic_move(new.name, str(target))
            self.module.set_mode_if_different(str(target), self.mode, False)
        for name in self.stale:
            target = self.root / name
            target.unlink()
            if target.parent != self.root:
                with contextlib.suppress(OSError):  # not empty
                    target.parent.rmdir()

    def _state(self, path: Path) -> tuple[bytes, int] | None:
        """Content and mode of a regular file; None for anything else, which is then replaced."""
        if path.is_symlink() or not path.is_file():
            return None
        return path.read_bytes(), path.stat().st_mode & 0o7777

    def _is_directory(self, path: Path) -> bool:
        return path.is_dir() and path.stat().st_mode & 0o7777 == self.directory_mode

    def _entry(self, name: str, content: bytes, mode: int | None) -> dict[str, str]:
        path = self.root / name
        before, before_mode = self._state(path) or (b"", None)
        entry = {"before": before.decode(errors="replace"), "after": content.decode(errors="replace")}
        modes = f"{before_mode or 0:04o}", f"{mode or 0:04o}"
        headers = modes if before_mode and mode and before_mode != mode else ("", "")
        return {
            **entry,
            "before_header": f"{path} {headers[0]}".strip(),
            "after_header": f"{path} {headers[1]}".strip(),
        }


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "files": {"type": "dict", "required": True},
            "mode": {"type": "str", "default": "0644"},
            "directory_mode": {"type": "str", "default": "0755"},
            "purge": {"type": "list", "elements": "str", "default": []},
            "validate": {"type": "str"},
        },
        supports_check_mode=True,
        no_log=True,  # keeps the texts of all files out of the host's syslog; results and diffs are shown all the same
    )
    for name in module.params["files"]:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            module.fail_json(msg=f"{name!r} is not a path below {module.params['path']}.")
    tree = Tree(module)
    result = {"changed": tree.changed(), "written": tree.outdated, "removed": tree.stale, "diff": tree.diff()}
    if tree.changed() and not module.check_mode:
        if module.params["validate"]:
            tree.check(module.params["validate"])
        tree.write()
    named = {key: value for key, value in module.params.items() if key != "files"}
    module.exit_json(**result, invocation={"module_args": named})  # without the texts, which can be long


if __name__ == "__main__":
    main()
