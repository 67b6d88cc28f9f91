"""The gateway's routes, one module for each part of the API."""
