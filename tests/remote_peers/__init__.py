"""A small trainer and a small rollout server, written from the protocol's description alone.

They share no code with rollout.remote, nor with examples/remote_rollout, so that a mistake is not made on both sides.
"""
