"""Measurements: what a round costs, beside what this machine could do at best in the same run."""
