"""What this machine could train on, tried for once: asked by `lydian doctor`."""
