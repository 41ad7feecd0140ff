"""Jobs, and the thread in which the engine runs them. A job is one request for the generation of one sequence."""
