"""The Ray Serve deployments: the engine (vLLM) and what surrounds it."""
