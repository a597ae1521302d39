"""HTTP in, answers out. A route parses, asks the coordinator, and answers; it decides nothing about training."""
