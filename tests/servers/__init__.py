"""Real servers for tests: each a context manager that configures, starts, and surely stops one."""
