"""The remote rollout protocol: rollouts that are played in one place and sampled in another, over HTTP.

Both sides of the wire: as the rollout server, a foreign trainer drives us; as the trainer, foreign rollout servers
use our engines. This package knows neither Ray nor a web framework.
"""
