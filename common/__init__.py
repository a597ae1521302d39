"""The ground that coordinator, worker and client stand on. Imports none of them, and never torch."""

PROTOCOL = 2  # of the HTTP calls; a coordinator serves its own number and the one before
__version__ = "0.1.0"
