"""Jobs, and the thread in which the engine runs them."""
