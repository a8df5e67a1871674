"""The OpenAI API: schemas, chat templates, incremental text and streaming."""
