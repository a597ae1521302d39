"""The dashboard: what a browser is shown. Reads the coordinator's state; what it changes, it changes by /v1 calls."""
