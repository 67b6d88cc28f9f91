"""A remote rollout server in one file, to copy."""
