"""`python -m server.proof`: what a state folder proves, read beside a coordinator or without one."""
