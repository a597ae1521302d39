"""Commands of `lydian` that have a module of their own; client/main.py lists them."""
