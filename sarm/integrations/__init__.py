"""SARM rewards in RLHF frameworks: an HTTP server, its client, and adapters.

The frameworks pin transformers versions that clash with each other's: HTTP is the boundary.
`client`, `openrlhf` and `verl` therefore import nothing beyond the standard library.
"""
