"""How Sunset tells: the words of its messages and the ways they leave. Never sees rows, never the database."""
