"""Device kernels. They know nothing of gdnir, and nothing imports them before the first launch."""
