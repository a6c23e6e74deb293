"""Bytes in local files and S3 behind one class."""
