"""The command line: `lydian` and `submit_job`."""
