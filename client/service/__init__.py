"""`lydian install-service`: the coordinator or a worker as a systemd service."""
