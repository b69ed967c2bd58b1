"""Launchers: each turns the same jobs into its own words, and knows nothing of what a command does."""
