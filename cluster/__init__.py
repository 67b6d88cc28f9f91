"""The roof: one YAML file becomes a running cluster, and a command line to work with it."""
