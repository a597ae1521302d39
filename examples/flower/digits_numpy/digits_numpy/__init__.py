"""Handwritten digits as a Flower app of the older API."""
