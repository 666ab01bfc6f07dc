"""The same towers for inference alone: packed weights, mixed precision, no padding, no row that nobody reads."""
