"""A run: its configuration, its records, its directory and its manifest."""
