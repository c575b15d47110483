"""One program under three names: nvml-sim, and the stand-ins nvidia-smi and nvidia-ctk."""

import sys
from pathlib import Path

import ctk
import sim
import smi

MAINS = {"nvml-sim": sim.main, "nvidia-smi": smi.main, "nvidia-ctk": ctk.main}

sys.exit(MAINS.get(Path(sys.argv[0]).name, sim.main)(sys.argv[1:]))
