"""What a model needs of GPUs and how fast they would be, computed without one."""
