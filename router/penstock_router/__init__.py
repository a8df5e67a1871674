"""The router: the OpenAI API in front of the workers, and the choice among them."""
