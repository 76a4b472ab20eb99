"""Gradient health: records what clipping sees, and says which layer is why a training run goes wrong."""
