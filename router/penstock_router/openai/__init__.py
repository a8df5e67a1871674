"""The OpenAI API: its requests, its text, and its responses."""
