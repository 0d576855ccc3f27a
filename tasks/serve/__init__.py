"""Many adapters on one frozen model behind one address: OpenAI's chat completions with a picture, and a page that uses them."""
