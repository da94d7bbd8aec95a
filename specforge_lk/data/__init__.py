"""What a draft is trained and measured on: prompts, responses, conversations, captured features."""
