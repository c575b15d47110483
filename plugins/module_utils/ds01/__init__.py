"""DS01's core package: who gets which GPU, and the container on exactly that device.

Pure parts (no I/O, standard library only): units, names, limits, model, placement, accounts_file,
container_spec, metrics. Adapters (one outside thing each): config, accounts, ledger, nvml, cdi, engine,
events, event_files, workspace. Verbs: allocations, containers, publishing. Door on a host: cli. Imports point that
way only.
"""
