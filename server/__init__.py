"""The coordinator: holds jobs and rounds, averages updates. No torch and no user code, ever."""
