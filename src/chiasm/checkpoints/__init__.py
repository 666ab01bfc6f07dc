"""Weight files to state dicts and configurations, without running anything in them."""
