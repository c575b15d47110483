"""The lab: GPU servers without a GPU, each a container that runs systemd, sshd and its own Docker engine."""
