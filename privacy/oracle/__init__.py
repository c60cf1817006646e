"""The data door and its implementations."""
