"""The platform under it all: a content-addressed store, hashing, locks, garbage, the environment."""
