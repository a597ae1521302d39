"""`lydian chaos`: breaks a local fleet on purpose, by a seeded schedule, and counts what was lost."""
