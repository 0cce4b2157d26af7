"""What another package adds to gdnir without touching it. Load it with `gdnir.load_plugins(["example"])`."""
