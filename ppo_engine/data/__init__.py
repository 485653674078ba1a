"""Data: files of rows in, checked examples and their token ids out."""
