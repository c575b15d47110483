"""nvidia-smi and nvidia-ctk of the simulated driver, with a /dev of their own: what is to be put on PATH."""

from __future__ import annotations

from pathlib import Path

SIM = Path(__file__).resolve().parents[2] / "build" / "sim"

_TOOL = """\
#!/usr/bin/python3 -IS
import os, sys
tool = {tool!r}
sys.path.insert(0, tool)
import nodes, state, {module}
sys.argv[0] = tool  # beside it lies the library
{body}
"""
# As root the real nvidia-smi makes the nodes that are missing.
_SMI = "nodes.sync(state.State.read(os.environ['NVML_SIM_STATE']), {root!r})\nsys.exit(smi.main(sys.argv[1:]))"
_CTK = "sys.exit(ctk.main([*sys.argv[1:], *(['--dev-root', {root!r}] if 'generate' in sys.argv else [])]))"


def write(folder: Path, machine: Path) -> Path:
    """Both, into this folder; their /dev is below `machine`."""
    folder.mkdir()
    for name, module, body in (("nvidia-smi", "smi", _SMI), ("nvidia-ctk", "ctk", _CTK)):
        text = _TOOL.format(tool=str(SIM / "bin" / name), module=module, body=body.format(root=str(machine)))
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder
