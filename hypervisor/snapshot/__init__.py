"""Snapshots: what a saved machine is on disk, how it gets there whole, and what tells two of them apart."""
