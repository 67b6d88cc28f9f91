"""Test doubles for tests and scale experiments. Nothing in the product uses them by default."""
