"""Pure functions from vectors to a scalar."""
