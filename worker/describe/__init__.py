"""What a training set is made of, found by the child that trains: for `lydian partition`."""
