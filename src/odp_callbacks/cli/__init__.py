"""The command line ``odp-callbacks``."""
