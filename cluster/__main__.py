"""`python -m cluster` is the `rollout` command."""

from cluster.cli import main

main()
