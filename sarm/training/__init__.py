"""Training: SAEs on the residual stream, and the convex head on their features."""
