"""Models over several GPUs."""
