"""The demonstration: the whole job on SmolLM2-135M, a few CPU minutes, no account."""
