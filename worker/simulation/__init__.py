"""Many virtual workers in one process, with one child that trains for all of them: what `lydian simulate` starts."""
