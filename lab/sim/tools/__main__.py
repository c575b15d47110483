"""One program under three names: nvml-sim, and the stand-ins nvidia-smi and nvidia-ctk."""

import importlib
import sys
from pathlib import Path

MODULES = {"nvidia-smi": "smi", "nvidia-ctk": "ctk"}

# Only the one that is asked for: nothing of a single-file program is compiled beforehand.
sys.exit(importlib.import_module(MODULES.get(Path(sys.argv[0]).name, "sim")).main(sys.argv[1:]))
