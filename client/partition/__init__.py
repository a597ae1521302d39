"""`lydian partition`: a job's training set, cut as the job will cut it, in numbers and as a picture."""
