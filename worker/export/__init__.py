"""Exporting a model as a program: a process that has torch, started by `lydian export`."""
