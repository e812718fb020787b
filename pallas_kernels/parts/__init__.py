"""One idea a file, shared by every kernel."""
