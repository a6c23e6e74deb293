"""Storage of bytes in local files and S3 with one interface."""
