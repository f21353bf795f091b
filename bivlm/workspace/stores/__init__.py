"""The stores of a workspace's bytes: a folder, or an S3 bucket."""
