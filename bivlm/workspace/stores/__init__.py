"""Where the bytes of a workspace are kept: a folder, or an S3 bucket."""
