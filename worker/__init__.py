"""The agent on a machine that trains. Torch lives in its child process alone."""
