"""`lydian track`: a job's rounds, told to TensorBoard, W&B, Trackio, MLflow, or a file."""
