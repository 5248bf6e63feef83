"""Data, servers and small runs that several tests use."""
